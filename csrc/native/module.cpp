// corrsteer._native: the operations on a CPU, as Python calls them. Everything is checked here once more, whatever
// was checked before, so that no call can read or write what does not belong to its tensors. No torch headers: one
// build serves every torch version.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "arguments.h"
#include "encode.h"
#include "power_sums.h"
#include "sparse.h"
#include "steer_add.h"

namespace py = pybind11;

namespace corrsteer {
namespace {

const std::vector<Dtype> F32{Dtype::float32}, F64{Dtype::float64}, I32{Dtype::int32}, I64{Dtype::int64},
    BOOL{Dtype::boolean};
const std::vector<Dtype> RESIDUALS{Dtype::float32, Dtype::bfloat16, Dtype::float16};

constexpr Named<Activation> ACTIVATIONS[] = {{"relu", Activation::relu}, {"jumprelu", Activation::jumprelu},
                                             {"gated", Activation::gated}, {"topk", Activation::topk},
                                             {"abstopk", Activation::abstopk}};
constexpr Named<InputNorm> INPUT_NORMS[] = {{"none", InputNorm::none}, {"layer_norm", InputNorm::layer_norm},
                                            {"constant_norm_rescale", InputNorm::constant_norm_rescale}};
constexpr Named<Dtype> PACKED_DTYPES[] = {{"float32", Dtype::float32}, {"bfloat16", Dtype::bfloat16}};

using Arrays = std::map<std::string, Array>;

// Instruction sets of this processor that there are kernels for, the best first; "portable" is always there.
std::vector<const Kernels*> offered() {
    std::vector<const Kernels*> out;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#if defined(COMPILES_AVX512_BF16)
    if (wide && __builtin_cpu_supports("avx512bf16")) out.push_back(&avx512_bf16);
#endif
    if (wide) out.push_back(&avx512);
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) out.push_back(&avx2);
#endif
    out.push_back(&portable);
    return out;
}

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const Kernels* one : offered()) names.emplace_back(one->name);
    return names;
}

const Kernels& kernels_named(const std::string& name) {
    for (const Kernels* one : offered())
        if (name == one->name) return *one;
    refuse("instruction_set must be one that this processor offers (" + alternatives(instruction_sets()) + "), got " +
           name);
}

void check_threads(int threads) {
    if (threads < 1) refuse("threads must be at least 1, got " + std::to_string(threads));
}

void check_sizes(int64_t d_sae, int64_t d_in) {
    if (d_in < 1 || d_sae < 1 || d_in > INT32_MAX || d_sae > INT32_MAX)
        refuse("d_sae and d_in must lie in 1.." + std::to_string(INT32_MAX) + ", got " + std::to_string(d_sae) +
               " and " + std::to_string(d_in));
}

template <class T>
T* data_of(const std::string& name, const Array& array, const std::vector<Dtype>& dtypes,
           const std::vector<int64_t>& sizes) {
    return array.expect(name, dtypes, sizes).contiguous(name).data<T>();
}

const float* vector_of(const char* name, const std::optional<Array>& array, int64_t d_sae, bool needed) {
    if (!needed) return nullptr;
    if (!array) refuse(std::string(name) + " must be given for this activation");
    return data_of<float>(name, *array, F32, {d_sae});
}

Encoder make_encoder(const std::string& instruction_set, int64_t d_in, int64_t d_sae,
                     const std::string& activation_name, const std::string& input_norm, int64_t k, const Array& weight,
                     const Array& bias, const std::optional<Array>& threshold,
                     const std::optional<Array>& magnitude_scale, const std::optional<Array>& magnitude_bias) {
    const Kernels& kernels = kernels_named(instruction_set);
    check_sizes(d_sae, d_in);
    const Activation activation = parse("activation", ACTIVATIONS, activation_name);
    if (is_topk(activation) && (k < 1 || k > d_sae))
        refuse("k must lie in 1..d_sae=" + std::to_string(d_sae) + ", got " + std::to_string(k));
    const void* packed = data_of<void>("weight", weight, {Dtype::float32, Dtype::bfloat16},
                                       {packed_size(kernels, d_sae, d_in, weight.dtype)});
    const bool gated = activation == Activation::gated, jumprelu = activation == Activation::jumprelu;
    const Encoder out{&kernels, d_in, d_sae, k, activation, parse("input_norm", INPUT_NORMS, input_norm),
                      packed, weight.dtype,
                      vector_of("bias", bias, d_sae, true),
                      vector_of("threshold", threshold, d_sae, jumprelu),
                      vector_of("magnitude_scale", magnitude_scale, d_sae, gated),
                      vector_of("magnitude_bias", magnitude_bias, d_sae, gated)};
    for (int64_t i = 0; out.threshold && i < d_sae; i++)
        if (std::isnan(out.threshold[i]))
            refuse("threshold must not be NaN, got NaN for feature " + std::to_string(i) + "; load the SAE again");
    return out;
}

Rows rows_of(const char* name, const Array& array, int64_t width) {
    array.expect(name, RESIDUALS, {-1, width}).contiguous(name, 1);
    return {array.data<void>(), array.dtype, array.shape[0], array.strides[0]};
}

const int32_t* checked_cu_seqlens(const Array& cu_seqlens, int64_t tokens) {
    cu_seqlens.expect("cu_seqlens", I32, {-1}).contiguous("cu_seqlens");
    const int64_t n = cu_seqlens.shape[0];
    const auto* at = cu_seqlens.data<int32_t>();
    bool fits = n > 0 && at[0] == 0 && at[n - 1] == tokens;
    for (int64_t j = 1; fits && j < n; j++) fits = at[j - 1] <= at[j];
    if (!fits)
        refuse("cu_seqlens must start at 0, never decrease and end at T=" + std::to_string(tokens) + ", got " +
               std::to_string(n) + " numbers that do not");
    return at;
}

State state_of(const Arrays& arrays, int64_t features, int64_t labels) {
    State state{features, labels};
    const struct {
        const char* name;
        double*& data;
        std::vector<int64_t> shape;
    } members[] = {
        {"count", state.count, {}},
        {"z_mean", state.z_mean, {features}},
        {"z_m2", state.z_m2, {features}},
        {"y_mean", state.y_mean, {labels}},
        {"y_m2", state.y_m2, {labels}},
        {"cross", state.cross, {labels, features}},
        {"n_positive", state.n_positive, {labels}},
        {"n_active", state.n_active, {features}},
        {"group_sum", state.group_sum, {2, labels, features}},
        {"group_active_sum", state.group_active_sum, {2, labels, features}},
        {"group_active_count", state.group_active_count, {2, labels, features}},
    };
    for (const auto& [name, data, shape] : members) {
        const auto found = arrays.find(name);
        if (found == arrays.end()) refuse("moments must have " + std::string(name) + ", got arrays without it");
        data = data_of<double>("moments." + std::string(name), found->second, F64, shape);
    }
    return state;
}

void pack_weight(const std::string& instruction_set, const Array& weight, const Array& packed, int threads) {
    const Kernels& kernels = kernels_named(instruction_set);
    weight.expect("weight", RESIDUALS, {-1, -1}).contiguous("weight", 1);
    const int64_t d_sae = weight.shape[0], d_in = weight.shape[1];
    check_sizes(d_sae, d_in);
    const Dtype dtype = weight.dtype == Dtype::bfloat16 ? Dtype::bfloat16 : Dtype::float32;
    void* out = data_of<void>("packed", packed, {dtype}, {packed_size(kernels, d_sae, d_in, dtype)});
    check_threads(threads);
    py::gil_scoped_release released;
    pack(kernels, {weight.data<void>(), weight.dtype, d_sae, weight.strides[0]}, d_in, out, threads);
}

void run_encode(const Encoder& encoder, const Array& x, const Array& out, int threads) {
    const Rows rows = rows_of("x", x, encoder.d_in);
    Outputs outputs;
    outputs.dense = data_of<float>("out", out, F32, {rows.n, encoder.d_sae});
    check_threads(threads);
    py::gil_scoped_release released;
    if (rows.n) encode(encoder, rows, nullptr, 0, outputs, threads);
}

void run_encode_pool(const Encoder& encoder, const Array& x, const Array& cu_seqlens, const std::optional<Array>& mean,
                     const std::optional<Array>& maximum, int threads) {
    const Rows rows = rows_of("x", x, encoder.d_in);
    const int32_t* ends = checked_cu_seqlens(cu_seqlens, rows.n);
    const int64_t samples = cu_seqlens.shape[0] - 1;
    Outputs outputs;
    if (mean) outputs.mean = data_of<float>("mean", *mean, F32, {samples, encoder.d_sae});
    if (maximum) outputs.maximum = data_of<float>("maximum", *maximum, F32, {samples, encoder.d_sae});
    if (!mean && !maximum) refuse("mean or maximum must be given");
    check_threads(threads);
    py::gil_scoped_release released;
    if (samples) encode(encoder, rows, ends, samples, outputs, threads);
}

void run_encode_update(const Encoder& encoder, const Array& x, const Array& cu_seqlens, const Array& y,
                       const std::optional<Arrays>& mean, const std::optional<Arrays>& maximum, int threads) {
    const Rows rows = rows_of("x", x, encoder.d_in);
    const int32_t* ends = checked_cu_seqlens(cu_seqlens, rows.n);
    const int64_t samples = cu_seqlens.shape[0] - 1;
    Outputs outputs;
    outputs.y = data_of<double>("y", y, F64, {samples, -1}), outputs.labels = y.shape[1];
    if (mean) outputs.mean_state = state_of(*mean, encoder.d_sae, outputs.labels);
    if (maximum) outputs.maximum_state = state_of(*maximum, encoder.d_sae, outputs.labels);
    if (!mean && !maximum) refuse("mean or maximum must be given");
    check_threads(threads);
    py::gil_scoped_release released;
    if (samples) encode(encoder, rows, ends, samples, outputs, threads);
}

void run_update_moments(const std::string& instruction_set, const Array& pooled, const Array& y, const Arrays& moments,
                        int threads) {
    const Kernels& kernels = kernels_named(instruction_set);
    y.expect("y", F64, {-1, -1}).contiguous("y");
    const auto z_mean = moments.find("z_mean");
    const int64_t features = z_mean != moments.end() && z_mean->second.shape.size() == 1 ? z_mean->second.shape[0] : 0;
    const State state = state_of(moments, features, y.shape[1]);
    const Rows rows = rows_of("pooled", pooled, features);
    y.expect("y", F64, {rows.n, -1});
    check_threads(threads);
    py::gil_scoped_release released;
    update_moments(kernels, rows, y.data<double>(), state, threads);
}

void run_update_sums(const std::string& instruction_set, const Array& pooled, const Array& weights, const Array& sums,
                     const std::vector<int64_t>& powers, int threads) {
    const Kernels& kernels = kernels_named(instruction_set);
    sums.expect("sums", F64, {-1, -1}).contiguous("sums", 1);
    const int64_t features = sums.shape[0], columns = sums.shape[1];
    if (features > 1 && sums.strides[0] < columns)
        refuse("sums must not hold the same element twice, got strides " + text(sums.strides) + " for " +
               text(sums.shape));
    const Rows rows = rows_of("pooled", pooled, features);
    weights.expect("weights", F64, {rows.n, columns}).contiguous("weights");
    int64_t left = columns;  // that have no power yet
    bool fits = true;
    for (int64_t count : powers) {
        fits = fits && count >= 0 && count <= left;
        if (fits) left -= count;
    }
    if (!fits || left)
        refuse("powers must be column counts that add up to " + std::to_string(columns) + ", got " + text(powers));
    check_threads(threads);
    py::gil_scoped_release released;
    if (rows.n && features && columns)
        update_sums(kernels, rows, features, weights.data<double>(), powers, sums.data<double>(), sums.strides[0],
                    threads);
}

void run_count_nonzeros(const std::string& instruction_set, const Array& pooled, const Array& counts, int threads) {
    const Kernels& kernels = kernels_named(instruction_set);
    pooled.expect("pooled", RESIDUALS, {-1, -1});
    const Rows rows = rows_of("pooled", pooled, pooled.shape[1]);
    auto* into = data_of<int64_t>("counts", counts, I64, {rows.n});
    check_threads(threads);
    py::gil_scoped_release released;
    count_nonzeros(kernels, rows, pooled.shape[1], into, threads);
}

// Offsets that rise from 0 or more to at most `end`.
const int64_t* checked_offsets(const Array& offsets, int64_t n, int64_t end) {
    const auto* at = data_of<int64_t>("offsets", offsets, I64, {n + 1});
    bool fits = at[0] >= 0 && at[n] <= end;
    for (int64_t i = 0; fits && i < n; i++) fits = at[i] <= at[i + 1];
    if (!fits) refuse("offsets must rise from 0 to at most the number of values, " + std::to_string(end));
    return at;
}

void run_list_nonzeros(const std::string& instruction_set, const Array& pooled, const Array& offsets,
                       const Array& values, const Array& places, int threads) {
    const Kernels& kernels = kernels_named(instruction_set);
    pooled.expect("pooled", RESIDUALS, {-1, -1});
    const Rows rows = rows_of("pooled", pooled, pooled.shape[1]);
    auto* into = data_of<float>("values", values, F32, {-1});
    auto* beside = data_of<void>("places", places, {Dtype::uint16, Dtype::int32}, {values.shape[0]});
    const bool narrow = places.dtype == Dtype::uint16;
    if (pooled.shape[1] > (narrow ? int64_t(UINT16_MAX) + 1 : int64_t(INT32_MAX)))
        refuse("places must hold numbers below " + std::to_string(pooled.shape[1]) + ", got " + name_of(places.dtype));
    const int64_t* at = checked_offsets(offsets, rows.n, values.shape[0]);
    check_threads(threads);
    py::gil_scoped_release released;
    list_nonzeros(kernels, rows, pooled.shape[1], at, into, beside, narrow, threads);
}

void run_update_sparse_sums(const std::string& instruction_set, const Array& values, const Array& samples,
                            const Array& offsets, const Array& features, const Array& weights, int64_t first,
                            int64_t power, const Array& sums, int threads) {
    const Kernels& kernels = kernels_named(instruction_set);
    sums.expect("sums", F64, {-1, -1}).contiguous("sums", 1);
    const int64_t n = sums.shape[0], columns = sums.shape[1];
    if (n > 1 && sums.strides[0] < columns)
        refuse("sums must not hold the same element twice, got strides " + text(sums.strides) + " for " +
               text(sums.shape));
    const auto* z = data_of<float>("values", values, F32, {-1});
    const auto* of = data_of<int32_t>("samples", samples, I32, {values.shape[0]});
    if (offsets.shape.size() != 1 || offsets.shape[0] < 1) refuse("offsets must be [d_sae + 1], got " + text(offsets.shape));
    const int64_t d_sae = offsets.shape[0] - 1;
    const int64_t* at = checked_offsets(offsets, d_sae, values.shape[0]);
    const auto* chosen = data_of<int64_t>("features", features, I64, {n});
    for (int64_t f = 0; f < n; f++)
        if (chosen[f] < 0 || chosen[f] >= d_sae)
            refuse("features must lie in 0.." + std::to_string(d_sae - 1) + ", got " + std::to_string(chosen[f]));
    weights.expect("weights", F64, {-1, columns}).contiguous("weights");
    const int64_t rows = weights.shape[0];
    if (first < 0 || rows > INT32_MAX || first > INT32_MAX - rows)
        refuse("first must lie in 0.." + std::to_string(INT32_MAX) + " less the samples, got " + std::to_string(first));
    if (power < 1) refuse("power must be at least 1, got " + std::to_string(power));
    check_threads(threads);
    py::gil_scoped_release released;
    if (rows && n && columns)
        update_sparse_sums(kernels, {z, of, at}, chosen, n, weights.data<double>(), rows, columns, first, power,
                           sums.data<double>(), sums.strides[0], threads);
}

Strided strided(const Array& array) {
    Strided out{array.data<void>(), array.dtype};
    for (size_t i = 0; i < array.shape.size(); i++) out.shape[i] = array.shape[i], out.stride[i] = array.strides[i];
    return out;
}

void run_steer_add(const Array& h, const Array& vectors, const Array& row_vector,
                   const std::optional<Array>& positions) {
    h.expect("h", RESIDUALS, {-1, -1, -1});
    for (size_t i = 0; i < 3; i++)
        if (h.strides[i] == 0 && h.shape[i] > 1)
            refuse("h must not hold the same element twice, got strides " + text(h.strides) + "; use .contiguous()");
    vectors.expect("vectors", F32, {-1, h.shape[2]});
    const Strided rows = strided(row_vector.expect("row_vector", I32, {h.shape[0]}));
    for (int64_t b = 0; b < h.shape[0]; b++) {
        const int32_t v = *rows.at<int32_t>(b);
        if (v < -1 || v >= vectors.shape[0])
            refuse("row_vector must lie in -1.." + std::to_string(vectors.shape[0] - 1) + ", got " + std::to_string(v));
    }
    std::optional<Strided> where;
    if (positions) where = strided(positions->expect("positions", BOOL, {h.shape[0], h.shape[1]}));
    py::gil_scoped_release released;
    steer_add(strided(h), strided(vectors), rows, where ? &*where : nullptr);
}

}  // namespace
}  // namespace corrsteer

PYBIND11_MODULE(_native, module) {
    using namespace corrsteer;
    using py::arg;
    module.doc() = "corrsteer on the CPU; see corrsteer/native_backend.py, which calls it";
    module.def("instruction_sets", &instruction_sets,
               "Instruction sets of this processor that there are kernels for, the best first.");
    py::class_<Array>(module, "Array", "A tensor: address, shape, strides in elements, dtype.")
        .def(py::init<uintptr_t, std::vector<int64_t>, std::vector<int64_t>, const std::string&>(), arg("address"),
             arg("shape"), arg("strides"), arg("dtype"));
    py::class_<Encoder>(module, "Encoder", "An encoder with its weight packed; it holds addresses, not tensors.")
        .def(py::init(&make_encoder), py::kw_only(), arg("instruction_set"), arg("d_in"), arg("d_sae"),
             arg("activation"), arg("input_norm"), arg("k"), arg("weight"), arg("bias"), arg("threshold") = py::none(),
             arg("magnitude_scale") = py::none(), arg("magnitude_bias") = py::none());
    module.def("packed_size",
               [](const std::string& instruction_set, int64_t d_sae, int64_t d_in, const std::string& dtype) {
                   const Dtype packed_dtype = parse("dtype", PACKED_DTYPES, dtype);
                   return packed_size(kernels_named(instruction_set), d_sae, d_in, packed_dtype);
               },
               arg("instruction_set"), arg("d_sae"), arg("d_in"), arg("dtype"), "Elements of a packed weight.");
    module.def("pack", &pack_weight, arg("instruction_set"), arg("weight"), arg("packed"), arg("threads"),
               "Pack a weight [d_sae, d_in]: bfloat16 as it is, float16 as float32.");
    module.def("encode", &run_encode, arg("encoder"), arg("x"), arg("out"), arg("threads"));
    module.def("encode_pool", &run_encode_pool, arg("encoder"), arg("x"), arg("cu_seqlens"), arg("mean").none(true),
               arg("maximum").none(true), arg("threads"));
    module.def("encode_update", &run_encode_update, arg("encoder"), arg("x"), arg("cu_seqlens"), arg("y"),
               arg("mean").none(true), arg("maximum").none(true), arg("threads"));
    module.def("update_moments", &run_update_moments, arg("instruction_set"), arg("pooled"), arg("y"), arg("moments"),
               arg("threads"));
    module.def("update_sums", &run_update_sums, arg("instruction_set"), arg("pooled"), arg("weights"), arg("sums"),
               arg("powers"), arg("threads"));
    module.def("count_nonzeros", &run_count_nonzeros, arg("instruction_set"), arg("pooled"), arg("counts"),
               arg("threads"));
    module.def("list_nonzeros", &run_list_nonzeros, arg("instruction_set"), arg("pooled"), arg("offsets"),
               arg("values"), arg("places"), arg("threads"));
    module.def("update_sparse_sums", &run_update_sparse_sums, arg("instruction_set"), arg("values"), arg("samples"),
               arg("offsets"), arg("features"), arg("weights"), arg("first"), arg("power"), arg("sums"),
               arg("threads"));
    module.def("steer_add", &run_steer_add, arg("h"), arg("vectors"), arg("row_vector"),
               arg("positions").none(true));
}

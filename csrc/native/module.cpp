// corrsteer._native: the operations on a CPU, as Python calls them. Everything is checked here once more, whatever
// was checked before, so that no call can read or write what does not belong to its tensors. No torch headers: one
// build serves every torch version.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "arguments.h"
#include "encode.h"
#include "steer_add.h"
#include "power_sums.h"

namespace py = pybind11;

namespace corrsteer {
namespace {

const std::vector<Dtype> F32{Dtype::f32}, F64{Dtype::f64}, I32{Dtype::i32};
const std::vector<Dtype> RESIDUALS{Dtype::f32, Dtype::bf16, Dtype::f16};

// Instruction sets of this processor that there are kernels for, the best first; "portable" is always there.
std::vector<const Kernels*> offered() {
    std::vector<const Kernels*> out;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#if defined(WITH_AVX512_BF16)
    if (wide && __builtin_cpu_supports("avx512bf16")) out.push_back(&avx512_bf16);
#endif
    if (wide) out.push_back(&avx512);
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) out.push_back(&avx2);
#endif
    out.push_back(&portable);
    return out;
}

const Kernels& kernels_named(const std::string& name) {
    std::string names;
    for (const Kernels* one : offered()) {
        if (name == one->name) return *one;
        names += (names.empty() ? "" : ", ") + std::string(one->name);
    }
    refuse("instruction_set must be one that this processor offers (" + names + "), got " + name);
}

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const Kernels* one : offered()) names.emplace_back(one->name);
    return names;
}

int checked_threads(int threads) {
    if (threads < 1) refuse("threads must be at least 1, got " + std::to_string(threads));
    return threads;
}

const float* vector_of(const char* name, const std::optional<Array>& array, int64_t d_sae, bool wanted) {
    if (!wanted) return nullptr;
    if (!array) refuse(std::string(name) + " must be given for this activation");
    return array->expect(name, F32, {d_sae}).packed(name).data<float>();
}

bool packed_as_bf16(const std::string& dtype) {
    if (dtype != "float32" && dtype != "bfloat16") refuse("dtype must be float32 or bfloat16, got " + dtype);
    return dtype == "bfloat16";
}

Encoder make_encoder(const std::string& instruction_set, int64_t d_in, int64_t d_sae, const std::string& activation,
                     const std::string& input_norm, int64_t k, const Array& weight, const Array& bias,
                     const std::optional<Array>& threshold, const std::optional<Array>& magnitude_scale,
                     const std::optional<Array>& magnitude_bias) {
    Encoder out{};
    out.kernels = &kernels_named(instruction_set);
    if (d_in < 1 || d_sae < 1 || d_in > INT32_MAX || d_sae > INT32_MAX)
        refuse("d_in and d_sae must be sizes, got " + std::to_string(d_in) + " and " + std::to_string(d_sae));
    out.d_in = d_in, out.d_sae = d_sae, out.k = k;

    const std::vector<std::string> activations{"relu", "jumprelu", "gated", "topk", "abstopk"};
    size_t at = 0;
    while (at < activations.size() && activations[at] != activation) at++;
    if (at == activations.size())
        refuse("activation must be relu, jumprelu, gated, topk or abstopk, got " + activation);
    out.activation = Activation(at);
    const bool sparse = out.activation == Activation::topk || out.activation == Activation::abstopk;
    if (sparse && (k < 1 || k > d_sae))
        refuse("k must lie in 1..d_sae=" + std::to_string(d_sae) + ", got " + std::to_string(k));

    if (input_norm == "none") out.input_norm = InputNorm::none;
    else if (input_norm == "layer_norm") out.input_norm = InputNorm::layer_norm;
    else if (input_norm == "constant_norm_rescale") out.input_norm = InputNorm::constant_norm_rescale;
    else refuse("input_norm must be none, layer_norm or constant_norm_rescale, got " + input_norm);

    out.bf16 = weight.dtype == Dtype::bf16;
    weight.expect("weight", {Dtype::f32, Dtype::bf16}, {packed_size(*out.kernels, d_sae, d_in, out.bf16)});
    out.weight = weight.packed("weight").data<void>();
    const bool gated = out.activation == Activation::gated;
    out.bias = vector_of("bias", bias, d_sae, true);
    out.threshold = vector_of("threshold", threshold, d_sae, out.activation == Activation::jumprelu);
    out.magnitude_scale = vector_of("magnitude_scale", magnitude_scale, d_sae, gated);
    out.magnitude_bias = vector_of("magnitude_bias", magnitude_bias, d_sae, gated);
    for (int64_t i = 0; out.threshold && i < d_sae; i++)
        if (std::isnan(out.threshold[i]))
            refuse("threshold must not be NaN, got NaN for feature " + std::to_string(i) + "; load the SAE again");
    return out;
}

Rows rows_of(const char* name, const Array& array, int64_t width) {
    array.expect(name, RESIDUALS, {-1, width}).packed(name, 1);
    return {array.data<void>(), array.dtype, array.shape[0], array.strides[0]};
}

const int32_t* checked_cu_seqlens(const Array& cu_seqlens, int64_t tokens) {
    cu_seqlens.expect("cu_seqlens", I32, {-1}).packed("cu_seqlens");
    const int64_t n = cu_seqlens.shape[0];
    const auto* at = cu_seqlens.data<int32_t>();
    bool fits = n > 0 && at[0] == 0 && at[n - 1] == tokens;
    for (int64_t j = 1; fits && j < n; j++) fits = at[j - 1] <= at[j];
    if (!fits)
        refuse("cu_seqlens must start at 0, never decrease and end at T=" + std::to_string(tokens) + ", got " +
               std::to_string(n) + " numbers that do not");
    return at;
}

State state_of(const std::vector<Array>& arrays, int64_t features, int64_t labels) {
    const std::vector<std::vector<int64_t>> shapes{
        {}, {features}, {features}, {labels}, {labels}, {labels, features}, {labels}, {features},
        {2, labels, features}, {2, labels, features}, {2, labels, features}};
    if (arrays.size() != shapes.size())
        refuse("moments must be " + std::to_string(shapes.size()) + " arrays, got " + std::to_string(arrays.size()));
    double* data[11];
    for (size_t i = 0; i < arrays.size(); i++) data[i] = arrays[i].expect("moments", F64, shapes[i]).packed("moments").data<double>();
    return {data[0], data[1], data[2], data[3], data[4], data[5], data[6], data[7], data[8], data[9], data[10],
            features, labels};
}

void pack_weight(const std::string& instruction_set, const Array& weight, const Array& packed, int threads) {
    const Kernels& kernels = kernels_named(instruction_set);
    weight.expect("weight", RESIDUALS, {-1, -1}).packed("weight", 1);
    const bool bf16 = weight.dtype == Dtype::bf16;
    const int64_t d_sae = weight.shape[0], d_in = weight.shape[1];
    if (d_in < 1 || d_sae < 1 || d_in > INT32_MAX || d_sae > INT32_MAX)
        refuse("weight must be [d_sae, d_in], got " + text(weight.shape));
    packed.expect("packed", {bf16 ? Dtype::bf16 : Dtype::f32}, {packed_size(kernels, d_sae, d_in, bf16)}).packed("packed");
    checked_threads(threads);
    py::gil_scoped_release released;
    pack(kernels, {weight.data<void>(), weight.dtype, d_sae, weight.strides[0]}, d_in, bf16, packed.data<void>(), threads);
}

void run_encode(const Encoder& encoder, const Array& x, const Array& out, int threads) {
    const Rows rows = rows_of("x", x, encoder.d_in);
    out.expect("out", F32, {rows.n, encoder.d_sae}).packed("out");
    checked_threads(threads);
    Wanted wanted;
    wanted.dense = out.data<float>();
    py::gil_scoped_release released;
    if (rows.n) encode(encoder, rows, nullptr, 0, wanted, threads);
}

void run_encode_pool(const Encoder& encoder, const Array& x, const Array& cu_seqlens, const std::optional<Array>& mean,
                     const std::optional<Array>& maximum, int threads) {
    const Rows rows = rows_of("x", x, encoder.d_in);
    const int32_t* ends = checked_cu_seqlens(cu_seqlens, rows.n);
    const int64_t samples = cu_seqlens.shape[0] - 1;
    Wanted wanted;
    if (mean) wanted.mean = mean->expect("mean", F32, {samples, encoder.d_sae}).packed("mean").data<float>();
    if (maximum) wanted.maximum = maximum->expect("maximum", F32, {samples, encoder.d_sae}).packed("maximum").data<float>();
    if (!mean && !maximum) refuse("mean or maximum must be given");
    checked_threads(threads);
    py::gil_scoped_release released;
    if (samples) encode(encoder, rows, ends, samples, wanted, threads);
}

void run_encode_update(const Encoder& encoder, const Array& x, const Array& cu_seqlens, const Array& y,
                       const std::optional<std::vector<Array>>& mean, const std::optional<std::vector<Array>>& maximum,
                       int threads) {
    const Rows rows = rows_of("x", x, encoder.d_in);
    const int32_t* ends = checked_cu_seqlens(cu_seqlens, rows.n);
    const int64_t samples = cu_seqlens.shape[0] - 1;
    y.expect("y", F64, {samples, -1}).packed("y");
    State states[2];
    Wanted wanted;
    wanted.y = y.data<double>();
    if (mean) states[0] = state_of(*mean, encoder.d_sae, y.shape[1]), wanted.mean_state = &states[0];
    if (maximum) states[1] = state_of(*maximum, encoder.d_sae, y.shape[1]), wanted.maximum_state = &states[1];
    if (!mean && !maximum) refuse("mean or maximum must be given");
    checked_threads(threads);
    py::gil_scoped_release released;
    if (samples) encode(encoder, rows, ends, samples, wanted, threads);
}

void run_update_moments(const std::string& instruction_set, const Array& pooled, const Array& y,
                        const std::vector<Array>& moments, int threads) {
    const Kernels& kernels = kernels_named(instruction_set);
    y.expect("y", F64, {-1, -1}).packed("y");
    const int64_t features = moments.size() > 1 && moments[1].shape.size() == 1 ? moments[1].shape[0] : 0;
    const State state = state_of(moments, features, y.shape[1]);
    const Rows rows = rows_of("pooled", pooled, features);
    y.expect("y", F64, {rows.n, -1});
    checked_threads(threads);
    py::gil_scoped_release released;
    update_moments(kernels, rows, y.data<double>(), state, threads);
}

void run_update_sums(const std::string& instruction_set, const Array& pooled, const Array& weights, const Array& sums,
                     const std::vector<int64_t>& powers, int threads) {
    const Kernels& kernels = kernels_named(instruction_set);
    sums.expect("sums", F64, {-1, -1}).packed("sums", 1);
    const int64_t features = sums.shape[0], columns = sums.shape[1];
    if (features > 1 && sums.strides[0] < columns)
        refuse("sums must not hold the same number twice, got strides " + text(sums.strides) + " for " +
               text(sums.shape));
    const Rows rows = rows_of("pooled", pooled, features);
    weights.expect("weights", F64, {rows.n, columns}).packed("weights");
    int64_t left = columns;  // that have no power yet
    bool fits = true;
    for (int64_t count : powers) {
        fits = fits && count >= 0 && count <= left;
        if (fits) left -= count;
    }
    if (!fits || left)
        refuse("powers must be column counts that add up to " + std::to_string(columns) + ", got " + text(powers));
    checked_threads(threads);
    py::gil_scoped_release released;
    if (rows.n && features && columns)
        update_sums(kernels, rows, features, weights.data<double>(), powers, sums.data<double>(), sums.strides[0],
                    threads);
}

Strided strided(const Array& array) {
    Strided out{array.data<void>(), array.dtype, {1, 1, 1}, {0, 0, 0}};
    for (size_t i = 0; i < array.shape.size(); i++) out.shape[i] = array.shape[i], out.stride[i] = array.strides[i];
    return out;
}

void run_steer_add(const Array& h, const Array& vectors, const Array& row_vector, const std::optional<Array>& positions) {
    h.expect("h", RESIDUALS, {-1, -1, -1});
    for (size_t i = 0; i < 3; i++)
        if (h.strides[i] == 0 && h.shape[i] > 1)
            refuse("h must not hold the same number twice, got strides " + text(h.strides) + "; use .contiguous()");
    vectors.expect("vectors", F32, {-1, h.shape[2]});
    const Strided rows = strided(row_vector.expect("row_vector", I32, {h.shape[0]}));
    for (int64_t b = 0; b < h.shape[0]; b++) {
        const int32_t which = static_cast<const int32_t*>(rows.data)[b * rows.stride[0]];
        if (which < -1 || which >= vectors.shape[0])
            refuse("row_vector must lie in -1.." + std::to_string(vectors.shape[0] - 1) + ", got " + std::to_string(which));
    }
    std::optional<Strided> where;
    if (positions) where = strided(positions->expect("positions", {Dtype::boolean}, {h.shape[0], h.shape[1]}));
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
    py::class_<Array>(module, "Array", "A tensor: address, shape, strides in numbers, dtype.")
        .def(py::init<uintptr_t, std::vector<int64_t>, std::vector<int64_t>, const std::string&>(), arg("address"),
             arg("shape"), arg("strides"), arg("dtype"));
    py::class_<Encoder>(module, "Encoder", "An encoder with its weight packed; it holds addresses, not tensors.")
        .def(py::init(&make_encoder), py::kw_only(), arg("instruction_set"), arg("d_in"), arg("d_sae"),
             arg("activation"), arg("input_norm"), arg("k"), arg("weight"), arg("bias"), arg("threshold") = py::none(),
             arg("magnitude_scale") = py::none(), arg("magnitude_bias") = py::none());
    module.def("packed_size",
               [](const std::string& instruction_set, int64_t d_sae, int64_t d_in, const std::string& dtype) {
                   return packed_size(kernels_named(instruction_set), d_sae, d_in, packed_as_bf16(dtype));
               },
               arg("instruction_set"), arg("d_sae"), arg("d_in"), arg("dtype"), "Numbers in a packed weight.");
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
    module.def("steer_add", &run_steer_add, arg("h"), arg("vectors"), arg("row_vector"),
               arg("positions").none(true));
}

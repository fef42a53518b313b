"""EasySteer: a control vector and the specification of a request, in a folder.

EasySteer's documentation of 2026, `docs/user-guide/steering.md`: `ApplySpec` says which tokens.
"""

from __future__ import annotations

from corrsteer.files import to_json, write_utf8
from corrsteer.integrations.exports.control_vector import check_gguf, hint, write_directions
from corrsteer.integrations.exports.form import Export, Form

APPLY = {
    "generated": {"prompt_positions": [-1], "generation": "all"},
    "all": {"prompt": "all", "generation": "all"},
    "prompt": {"prompt": "all"},
}

USAGE = """\
import json
from vllm import LLM, SamplingParams
from vllm.steer_vectors import ApplySpec, SteeringSpec, VectorSpec

vectors = json.load(open({path!r}))["vectors"]
vectors = [VectorSpec(**vector | {{"apply": ApplySpec(**vector["apply"])}}) for vector in vectors]
llm = LLM({model!r}, enable_steer_vector=True, steer_algorithms=["direct"])
llm.generate(prompts, SamplingParams(temperature=0), steering=SteeringSpec(vectors=vectors))"""


def write(export: Export) -> str:
    """`vectors.gguf` and `steering.json`, which names it."""
    vectors = export.outputs(FORM.name)
    source, spec = export.path / "vectors.gguf", export.path / "steering.json"
    described = {
        "source": str(source.resolve()), "algorithm": "direct", "scale": 1.0, "layers": list(vectors),
        "normalize": False, "apply": APPLY[export.positions],
    }  # fmt: skip
    check_gguf()
    export.make_folder()
    write_directions(source, vectors, hint(export))
    write_utf8(spec, to_json({"vectors": [described]}, indent=1) + "\n")
    return USAGE.format(path=str(spec), model=export.model_name)


FORM = Form(
    "easysteer",
    "a folder with a control vector and the JSON of a request to EasySteer, which serves by vLLM",
    ("generated", "all", "prompt"),
    "not run: it needs its own build of vLLM",
    write,
)

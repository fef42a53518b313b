"""What a result file says of the machine it came from: the processor and the versions, nothing that names a host."""

import sae_lens
import torch
import triton

import corrsteer

KEPT = ("processor", "machine", "system", "python_version", "cpu")


def pytest_benchmark_update_machine_info(config, machine_info):
    cpu = {name: machine_info["cpu"].get(name) for name in ("brand_raw", "count", "flags")}
    kept = {name: machine_info[name] for name in KEPT} | {"cpu": cpu, "threads": torch.get_num_threads()}
    machine_info.clear()
    machine_info.update(kept)
    packages = {"corrsteer": corrsteer, "torch": torch, "triton": triton, "sae_lens": sae_lens}
    machine_info["versions"] = {name: module.__version__ for name, module in packages.items()}


def pytest_benchmark_update_json(config, benchmarks, output_json):
    for benchmark in output_json["benchmarks"]:  # medians and quartiles tell enough
        benchmark["stats"].pop("data", None)

"""What a result file says of the machine it came from: the processor and the versions, nothing that names a host."""

import torch

from corrsteer.report import doctor

KEPT = ("processor", "machine", "system", "python_version")


def pytest_benchmark_update_machine_info(config, machine_info):
    kept = {name: machine_info[name] for name in KEPT} | {"cpu": machine_info["cpu"].get("brand_raw")}
    report = doctor.examine()
    machine_info.clear()
    machine_info.update(kept | {"threads": torch.get_num_threads(), "corrsteer": report["corrsteer"]})
    machine_info.update({name: report[name] for name in ("packages", "devices", "extensions")})


def pytest_benchmark_update_json(config, benchmarks, output_json):
    for benchmark in output_json["benchmarks"]:  # medians and quartiles tell enough
        benchmark["stats"].pop("data", None)

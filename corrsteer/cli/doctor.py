"""`corrsteer doctor`."""

from __future__ import annotations

from corrsteer.cli.app import Json, command, emit


@command
def doctor(json: Json = False) -> None:
    """Say what runs on this machine: versions, devices, and each backend with the reason where it does not."""
    from corrsteer.report.doctor import examine, text

    report = examine()
    emit(report, json, text(report))

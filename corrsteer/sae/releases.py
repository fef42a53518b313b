"""Names of published SAEs, looked up in the list that SAELens comes with, so that a wrong one costs no network."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from corrsteer.errors import CorrSteerError

LIST = "https://decoderesearch.github.io/SAELens/latest/pretrained_saes/"
CLOSE = 3  # names that an error gives


def check_names(release: str, sae_id: str) -> None:
    """Raise unless this is a published SAE by SAELens' list, or may be one in a hub repository that is not in it.

    A repository that is in the list is refused: only by the name of its release does SAELens know all that there is
    to know about an SAE, such as that its model's weights were centred.
    """
    try:
        import sae_lens.loading.pretrained_saes_directory as directory
    except ImportError as error:
        raise CorrSteerError(
            f"published SAEs are loaded by SAELens, which cannot be imported ({error}): pip install sae-lens"
        ) from None
    known = directory.get_pretrained_saes_directory()
    if release in known:
        ids = known[release].saes_map
        if sae_id not in ids:
            raise CorrSteerError(
                f"sae_id must be one that release {release!r} has, got {sae_id!r}; {_close(sae_id, ids)}"
            )
    elif releases := directory.get_releases_for_repo_id(release):
        holding = [name for name in releases if sae_id in known[name].saes_map]
        raise CorrSteerError(
            f"release must be the name of a release, got the hub repository {release!r}; "
            f"use {' or '.join(holding or releases)}"
        )
    elif "/" not in release:
        raise CorrSteerError(
            f"release must be one that SAELens lists, or a hub repository OWNER/NAME, got {release!r}; "
            f"{_close(release, known)}"
        )


def _close(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, names, n=CLOSE, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"see {LIST}"

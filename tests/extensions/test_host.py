"""A host that another distribution registers."""

from __future__ import annotations

from pathlib import Path

import yaml
from extensions.outside import install, lpcam
from tiny import recipe_values, times

from lpcam.data.map_files import read_maps


def test_a_host_of_another_distribution(pictures: Path, weights: Path, tmp_path: Path) -> None:
    environment = install(tmp_path / "site", "toy_host", "lpcam.hosts", "colours", "HOST")
    folder, recipe = tmp_path / "run", tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_values(pictures, folder, weights)))
    words = ("run", recipe, "--until", "host-maps", "--host.method", "colours")
    done = lpcam(environment, *words)
    assert done.returncode == 0, done.stderr
    for number in range(12):
        found = read_maps(folder / "host-maps" / "colours" / f"i{number:02d}.npz")
        assert (
            len(found.cam)
            == len(found.high_res)
            == len(found.keys)
            == (number != 3) + (number % 4 == 0)
        )
        assert (folder / "host-seeds" / "colours" / f"i{number:02d}.png").is_file()
    before = times(folder)
    done = lpcam(environment, *words, "--host.colours.decay", "8")
    assert done.returncode == 0, done.stderr
    changed = {name.split("/")[0] for name, time in times(folder).items() if before[name] != time}
    assert {"host-maps", "host-seeds"} <= changed
    assert "host" not in changed
    refused = lpcam(environment, "run", recipe, "--host.method", "colour")
    assert refused.returncode == 2
    assert "colours" in refused.stderr

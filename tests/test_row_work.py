"""benchmarks/row_work.py at a tiny size."""

import importlib.util
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_every_objective_has_its_share(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("row_work", ROOT / "benchmarks" / "row_work.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    path = tmp_path / "row_work.json"
    sizes = {"rows": 40, "vocab": 3000, "hidden": 8, "k": 4, "rounds": 1}
    arguments = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
    monkeypatch.setattr("sys.argv", ["row_work.py", *arguments, "--json", str(path)])
    module.main()
    header, rule, *lines = capsys.readouterr().out.splitlines()
    assert header.count("|") == rule.count("|") == 8
    assert [line.split("`")[1] for line in lines] == list(module.OBJECTIVES)
    told = json.loads(path.read_text())
    assert told["case"]["rows"] == 40
    for text in module.OBJECTIVES:
        for normaliser in ("exact", "batch"):
            step, work = told["seconds"][text][normaliser]
            assert min(step, work) > 0

"""Write a component's files from its stage's declaration: run by ``make compile``, never edited by hand.

Kubeflow ships only the source of the decorated function, so each component is a file with its whole signature. Its
README is the contract for people: config, inputs, outputs.
"""

from pathlib import Path
from textwrap import wrap

from moesaic.core.stage import Port, Stage
from moesaic.stages import STAGES

FOLDER = Path(__file__).parent
_TYPES = {"model": "Model", "dataset": "Dataset", "artifact": "Artifact"}
_WORDS = {"model": "model", "dataset": "data set", "artifact": "artifact"}


def files_of(stage: Stage) -> dict[str, str]:
    """The text of every file of a component by its name."""
    return {
        "__init__.py": "",
        "component.py": component(stage),
        "README.md": contract(stage),
        "metadata.yaml": f"name: {stage.name}\nstability: alpha\nruntime: {stage.runtime}\ntags: [{_ring(stage)}]\n",
    }


def component(stage: Stage) -> str:
    """The decorated function: a signature and one call."""
    given = [port for port in stage.inputs if not port.optional]
    options = [port for port in stage.inputs if port.optional]
    kinds = sorted({_TYPES[port.kind] for port in (*stage.inputs, *stage.outputs)} | {"Input", "Metrics", "Output"})
    kinds = [kind for kind in kinds if kind != "Input" or stage.inputs]
    parameters = [
        "config: str",
        "version: str",
        *(f"{port.name}: {_input(port)}" for port in given),
        *(f"{port.name}: Output[{_TYPES[port.kind]}]" for port in stage.outputs),
        "metrics: Output[Metrics]",
        *(f"{port.name}: {_input(port)} | None = None" for port in options),
    ]
    runtime = ["run_stage", *([stage.returns] if stage.returns else [])]
    lines = [
        f'"""Kubeflow component of the stage `{stage.name}`, written by `make compile`."""',
        "",
        "from kfp import dsl",
        f"from kfp.dsl import {', '.join(kinds)}",
        "",
        "from components import images",
        "",
        "",
        f"@dsl.component(base_image=images.{stage.runtime.upper()}, install_kfp_package=False)",
        f"def {stage.name}(",
        *(f"    {parameter}," for parameter in parameters),
        ") -> list[str]:" if stage.returns else "):",
        *_docstring(stage.about[0]),
        f"    from moesaic.platform.runs.runtime import {', '.join(sorted(runtime))}",
        "",
        "    run_stage(",
        f'        "{stage.name}",',
        "        config,",
        *_mapping("inputs", [port.name for port in stage.inputs]),
        *_mapping("outputs", [*stage.output_names, "metrics"]),
        "    )",
        *([f"    return {stage.returns}({stage.output_names[0]}.path)"] if stage.returns else []),
    ]
    return "\n".join(lines) + "\n"


def contract(stage: Stage) -> str:
    """The README: what the stage does, what it takes and hands on."""
    room = stage.room.replace(".", "/")
    rows = [(port, _kind(port)) for port in (*stage.inputs, *stage.outputs)]
    inputs = [f"| `{port.name}` | {kind} | {port.content} |" for port, kind in rows[: len(stage.inputs)]]
    outputs = [f"| `{port.name}` | {kind} | {port.content} |" for port, kind in rows[len(stage.inputs) :]]
    head = ["| name | type | content |", "|---|---|---|"]
    config = (
        f"Config: `{stage.config.__name__}` in `src/{room}/stage.py`, as one JSON string. `version` is the code's "
        "version, a part of the cache key."
    )
    kept = "Every output carries a `record.json`: config, input digests, versions, hardware, metrics, duration, memory."
    return "\n".join(
        [
            *(f"# {stage.name}", "", *[line for text in stage.about for line in (text, "")], config, ""),
            *("## Inputs", ""),
            *([*head, *inputs, ""] if inputs else ["None; the config names manifests in the store.", ""]),
            *("## Outputs", "", *head, *outputs),
            "| `metrics` | metrics | what MLflow shows for the run |",
            *("", kept, ""),
        ]
    )


def _input(port: Port) -> str:
    kind = _TYPES[port.kind]
    return f"Input[list[{kind}]]" if port.many else f"Input[{kind}]"


def _kind(port: Port) -> str:
    word = f"list of {_WORDS[port.kind]}s" if port.many else _WORDS[port.kind]
    return f"{word}{', optional' if port.optional else ''}"


def _mapping(name: str, keys: list[str]) -> list[str]:
    if not keys:
        return [f"        {name}={{}},"]
    return [f"        {name}={{", *(f'            "{key}": {key},' for key in keys), "        },"]


def _docstring(text: str) -> list[str]:
    """The first sentence, on one line or as many as it takes."""
    sentence = text.split(". ")[0].removesuffix(".") + "."
    lines = wrap(sentence, 113, initial_indent='    """', subsequent_indent="    ", break_on_hyphens=False)
    return [*lines[:-1], lines[-1] + '"""'] if len(lines) == 1 else [*lines, '    """']


def _ring(stage: Stage) -> str:
    return stage.room.split(".")[1]


def generate(folder: Path = FOLDER) -> list[Path]:
    """Write the files of all components; those whose stage is gone must be removed by hand."""
    paths = []
    for stage in STAGES.values():
        (folder / stage.name).mkdir(exist_ok=True)
        for name, text in files_of(stage).items():
            paths.append(folder / stage.name / name)
            paths[-1].write_text(text)
    return paths


if __name__ == "__main__":
    generate()

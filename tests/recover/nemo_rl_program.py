"""Runs in NeMo-RL's environment, on its source: what it makes of our config and our classes, as JSON on the last line.

``python -m tests.recover.nemo_rl_program CONFIG MODEL`` with a config that `launch.prepare` rendered.
"""

import importlib
import json
import sys
import types
import typing
from pathlib import Path
from typing import Any

import typing_extensions
import yaml

if sys.version_info < (3, 12):  # NeMo-RL's own Python is newer; pydantic reads this module's TypedDict there only
    typing.TypedDict = typing_extensions.TypedDict


def main(config: Path, model: Path) -> None:
    from nemo_rl.algorithms.grpo import MasterConfig
    from nemo_rl.models.generation.vllm import VllmConfig

    from moesaic.recover.reinforce.nemo_rl import driver, surface

    rendered = yaml.safe_load(config.read_text())
    found: dict[str, Any] = {"lacking": lacking_names(surface.IMPORTED)}
    master = MasterConfig(**yaml.safe_load(config.read_text()))
    generation = rendered["policy"].pop("generation")  # the type of this key is that of any engine's
    found["unknown"] = [
        *unknown_keys(MasterConfig, rendered, ""),
        *unknown_keys(VllmConfig, generation, "policy.generation."),
    ]
    driver.register()
    found |= policy_of(master, model) | data_of(master)
    print(json.dumps(found))


def lacking_names(names: typing.Iterable[str]) -> list[str]:
    """Those that cannot be imported."""
    lacking = []
    for name in names:
        module, _, attribute = name.rpartition(".")
        try:
            if not hasattr(importlib.import_module(module), attribute):
                importlib.import_module(name)
        except ImportError as missing:
            lacking.append(f"{name}: {missing}")
    return lacking


def unknown_keys(kind: Any, value: Any, place: str) -> typing.Iterator[str]:
    """Keys of a rendered value that the type of its config does not declare."""
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        options = [list(unknown_keys(option, value, place)) for option in typing.get_args(kind) if fits(option, value)]
        yield from min(options, key=len, default=[])
    elif origin in (typing.Annotated, typing.Required, typing.NotRequired, typing_extensions.NotRequired):
        yield from unknown_keys(typing.get_args(kind)[0], value, place)
    elif isinstance(value, dict) and (declared := declared_keys(kind)):
        for key, inner in value.items():
            if key in declared:
                yield from unknown_keys(declared[key], inner, f"{place}{key}.")
            else:
                yield place + key
    elif isinstance(value, list) and origin is list:
        for inner in value:
            yield from unknown_keys(typing.get_args(kind)[0], inner, place)


def fits(kind: Any, value: Any) -> bool:
    return bool(declared_keys(kind)) == isinstance(value, dict) or typing.get_origin(kind) is not None


def declared_keys(kind: Any) -> dict[str, Any]:
    """The fields of a typed dict or of a pydantic model."""
    if typing_extensions.is_typeddict(kind) or hasattr(kind, "model_fields"):
        return typing.get_type_hints(kind, include_extras=True)
    return {}


def data_of(master: Any) -> dict[str, Any]:
    """What NeMo-RL's own data loading and an actor of ours in a Ray of its own make of our prompts."""
    import ray
    from nemo_rl.algorithms.utils import get_tokenizer
    from nemo_rl.data.utils import setup_response_data
    from nemo_rl.models.generation import configure_generation_config

    from moesaic.recover.reinforce.nemo_rl.graded_replies import keep_markers

    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    tokenizer = keep_markers(get_tokenizer(master.policy["tokenizer"]))
    generation = configure_generation_config(dict(master.policy["generation"]), tokenizer)
    dataset, _, environments, _ = setup_response_data(tokenizer, master.data, master.env)
    datum = dataset[0]
    (environment,) = set(environments.values())
    reply = [*datum["message_log"], {"role": "assistant", "content": "<|channel|> final <|message|> w3 <|return|>"}]
    returned = ray.get(environment.step.remote([reply], [datum["extra_env_info"]]))
    ray.shutdown()
    return {
        "rows": len(dataset),
        "prompt": datum["message_log"][0]["token_ids"].tolist(),
        "effort": datum["extra_env_info"]["effort"],
        "rewards": returned.rewards.tolist(),
        "load_format": generation["vllm_cfg"]["load_format"],
        "tasks": sorted(environments),
    }


class CpuTorch:
    """What AutoModel's module that loads models calls torch: on it every device is a CPU."""

    cuda = types.SimpleNamespace(current_device=lambda: "cpu", is_available=lambda: False)

    @staticmethod
    def device(*_: object) -> Any:
        import torch

        return torch.device("cpu")

    def __getattr__(self, name: str) -> Any:
        import torch

        return getattr(torch, name)


def policy_of(master: Any, model: Path) -> dict[str, Any]:
    """What NeMo-RL's worker would train, and the names and shapes under which it sends weights to vLLM."""
    import torch
    from nemo_automodel._transformers import auto_model
    from nemo_rl.models.automodel import setup

    from moesaic.models.whole_model import load_model
    from moesaic.recover.distill.automodel import cluster_model
    from moesaic.recover.reinforce.nemo_rl import policy_worker, trainable

    cluster_model.register()
    runtime = setup.validate_and_prepare_config(config=master.policy, processor=None, rank=0)
    options = dict(master.policy["dtensor_cfg"]["automodel_kwargs"])
    setup._maybe_set_force_hf(options, runtime.model_config)
    auto_model.torch = CpuTorch()
    setup._disable_automodel_checkpoint_dtype_restore()
    names = json.loads(Path(master.policy["dtensor_cfg"]["env_vars"]["MOESAIC_TRAINABLE"]).read_text())
    loaded = trainable.PartlyTrainable(runtime.model_class, names).from_pretrained(
        str(model), torch_dtype=str(runtime.model_config.torch_dtype), trust_remote_code=True, **options
    )
    tokens = torch.arange(3, 23).unsqueeze(0) % 40
    with torch.no_grad():
        ours, reference = loaded(tokens).logits, load_model(model).float()(tokens).logits
    sent = dict(
        pair
        for name, tensor in loaded.state_dict().items()
        for pair in loaded.state_dict_adapter.convert_single_tensor_to_hf(name, tensor, exclude_key_regex=None)
    )
    return {
        "class": f"{type(loaded).__module__}.{type(loaded).__name__}",
        "worker": policy_worker.PolicyWorker.__ray_metadata__.class_name,
        "options": options,
        "difference": (ours - reference).abs().max().item() / reference.abs().max().item(),
        "learns": sorted(name for name, weight in loaded.named_parameters() if weight.requires_grad),
        "types": {name: str(weight.dtype) for name, weight in loaded.named_parameters()},
        "sent": {name: list(tensor.shape) for name, tensor in sent.items()},
    }


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))

"""What a run of ``compress`` leaves in a store, without its hours: every stage's record, and its child's manifest."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from moesaic.core.config import Config
from moesaic.pipelines.recipe import Recipe
from moesaic.platform.ingest.stage import IngestConfig
from moesaic.platform.runs.lineage import keep_record
from moesaic.platform.runs.records import Record
from moesaic.platform.store import Manifest, Store
from moesaic.search.prune_model.stage import PruneModelConfig

SETS = ("calibration_short", "calibration_long", "prompts", "tests")


@dataclass(frozen=True)
class Made:
    """An artifact, by its content and its record."""

    digest: str
    record: Record

    def write_record(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.record.write(directory)


@dataclass(frozen=True)
class PlayedRun:
    child: Made
    report: Made
    verdict: Made
    inputs: IngestConfig


class Player:
    """Puts records where the runtime does."""

    def __init__(self, store: Store, scratch: Path) -> None:
        self.store, self._scratch = store, scratch

    def run(self, stage: str, config: Config, subject: str = "", **given: Made | list[Made]) -> Made:
        def each(value: Made | list[Made], what: str) -> str | list[str]:
            ones = value if isinstance(value, list) else [value]
            found = [one.digest if what == "digest" else one.record.origin for one in ones]
            return found if isinstance(value, list) else found[0]

        record = Record(
            stage=stage,
            subject=subject,
            config=config.model_dump(mode="json"),
            config_digest=config.digest,
            inputs={name: each(value, "digest") for name, value in given.items()},
            origins={name: each(value, "origin") for name, value in given.items()},
            versions={"moesaic": "0.1.0"},
            code_digest="c" * 64,
            hardware={},
            seed=None,
            metrics={},
            started="2026-01-01T00:00:00+00:00",
            duration_s=1.0,
            peak_memory_mib=1.0,
        )
        keep_record(self.store, record)
        return Made(hashlib.sha256(record.origin.encode()).hexdigest(), record)

    def model(self, made: Made) -> Made:
        """The same with a manifest in the store for its content."""
        directory = self._scratch / made.digest
        directory.mkdir(parents=True)
        (directory / "weights").write_text(made.digest)
        manifest = self.store.add_directory(directory, "model", format="safetensors", producer=made.record.stage)
        return Made(manifest.id, made.record)

    def data(self, name: str) -> Manifest:
        path = self._scratch / f"{name}.jsonl"
        path.write_text(f'{{"id": "{name}"}}\n')
        return self.store.add_file(path, "dataset", format="jsonl", producer="ingest")


def play(store: Store, recipe: Recipe, scratch: Path, name: str = "puzzle") -> PlayedRun:
    """Every stage of the pipeline ``compress``, in its order; ``name`` tells runs of the same recipe apart."""
    player = Player(store, scratch)
    scratch.mkdir(parents=True, exist_ok=True)
    parent_directory = scratch / "parent"
    parent_directory.mkdir()
    (parent_directory / "config.json").write_text("{}")
    parent_id = store.add_directory(parent_directory, "model", format="safetensors", producer="ingest").id
    inputs = IngestConfig(parent=parent_id, **{one: player.data(one).id for one in SETS})
    source = {one: Made(getattr(inputs, one), player.run("ingest", inputs, one).record) for one in ("parent", *SETS)}
    parent, short, long, tests = (source[one] for one in ("parent", "calibration_short", "calibration_long", "tests"))
    traces = player.run("generate_traces", recipe.generate_traces, "parent", model=parent, prompts=source["prompts"])

    def shrink(model: Made, search_config: Config) -> dict[str, Made]:
        ranking = player.run("rank_experts", recipe.rank_experts, parent=model, calibration_short=short)
        scores = player.run(
            "score_blocks",
            recipe.score_blocks,
            parent=model,
            ranking=ranking,
            calibration_short=short,
            calibration_long=long,
        )
        costs = player.run("measure_costs", recipe.measure_costs, parent=model)
        found = player.run("search_architecture", search_config, parent=model, scores=scores, costs=costs)
        refined = player.run(
            "refine_architecture",
            recipe.refine_architecture,
            parent=model,
            ranking=ranking,
            scores=scores,
            costs=costs,
            architecture=found,
        )
        return {"ranking": ranking, "scores": scores, "costs": costs, "architecture": refined}

    def prune(config: PruneModelConfig, model: Made, found: dict[str, Made]) -> Made:
        given = {"ranking": found["ranking"], "architecture": found["architecture"]}
        return player.run("prune_model", config, config.candidate, parent=model, **given)

    def learn(child: Made, config: Config) -> Made:
        routed = player.run("fit_routers", recipe.fit_routers, child=child, parent=parent, calibration=short)
        local = player.run("distill_blocks", recipe.distill_blocks, child=routed, parent=parent, calibration=short)
        return player.run("distill", config, child=local, parent=parent, traces=traces)

    def measure(model: Made, kv_cache: str | None = None) -> Made:
        config = recipe.evaluate if kv_cache is None else recipe.evaluate.model_copy(update={"kv_cache": kv_cache})
        return player.run("evaluate", config, model=model, tests=tests)

    def recover(pruned: Made) -> tuple[Made, Made]:
        distilled = learn(pruned, recipe.distill)
        policies = [
            player.run("reinforce", policy, model=distilled, prompts=source["prompts"], traces=traces)
            for policy in recipe.policies
        ]
        averaged = player.run("average_checkpoints", recipe.average_checkpoints, policies=policies)
        calibrated = player.model(
            player.run("calibrate_kv", recipe.calibrate_kv, name, model=averaged, calibration=short)
        )
        gathered = player.run(
            "gather_recovery",
            recipe.gather_recovery,
            traces=traces,
            distilled=distilled,
            evaluation_pruned=measure(pruned),
            evaluation_distilled=measure(distilled),
            evaluations_policies=[measure(policy) for policy in policies],
            evaluation_averaged=measure(averaged),
            evaluation_fp8_unit=measure(calibrated, "fp8_unit"),
            evaluation_fp8=measure(calibrated, "fp8"),
        )
        return calibrated, gathered

    model = parent
    for _ in range(recipe.rounds - 1):
        earlier = shrink(model, recipe.earlier_search_architecture)
        model = learn(prune(recipe.prune_model, model, earlier), recipe.earlier_distill)
    found = shrink(model, recipe.search_architecture)
    pruned, uniform = prune(recipe.prune_model, model, found), prune(recipe.baseline, model, found)
    child, recovery = recover(pruned)
    scaled = player.run("calibrate_kv", recipe.calibrate_kv, "parent", model=parent, calibration=short)
    bundles = {
        role: player.run("export_engine", recipe.export_engine, child=model)
        for role, model in (("parent", scaled), ("child", child))
    }
    random = prune(PruneModelConfig(candidate="random-0"), model, found)
    report = player.run(
        "report",
        recipe.report,
        **found,
        evaluation_parent=measure(parent),
        evaluation_child=measure(pruned),
        baselines=[measure(random), measure(uniform)],
        measurements=player.run("benchmark", recipe.benchmark, parent=parent, child=pruned),
        recovery=recovery,
        recovery_baseline=recover(uniform)[1],
        serving=player.run("benchmark_serving", recipe.benchmark_serving, **bundles),
    )
    verdict = player.run("validate_bundle", recipe.validate_bundle, bundle=bundles["child"], prompts=source["prompts"])
    return PlayedRun(child, report, verdict, inputs)

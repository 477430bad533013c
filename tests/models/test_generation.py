"""Generation gives the tokens of transformers' own ``generate``, whatever the batches."""

import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from moesaic.core.errors import ArtifactError, ConfigError
from moesaic.models import generation
from moesaic.models.architecture import Block
from moesaic.models.families.gpt_oss_puzzle.configuration_gpt_oss_puzzle import GptOssPuzzleConfig
from moesaic.models.families.gpt_oss_puzzle.modeling_gpt_oss_puzzle import GptOssPuzzleForCausalLM
from moesaic.models.generation import Decoding, Generated, Sampling, generate, generate_batches, read_stop_ids, stop_ids
from moesaic.models.whole_model import load_model
from tests.closeness import NEAR_TIE, assert_near, assert_same_replies

STOPS = frozenset(range(5, 13))
"""Many stop tokens, so that random models stop at many lengths."""
NEVER: frozenset[int] = frozenset()


@pytest.fixture(scope="module")
def parent(tiny_parent: Path) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(tiny_parent, attn_implementation="eager")
    return model.float().eval()  # transformers unpacks MXFP4 to bfloat16, in which batches of different size differ


@pytest.fixture(scope="module")
def child(parent: PreTrainedModel) -> PreTrainedModel:
    """A random child: experts, their width, experts per token, and windows beside full attention differ."""
    blocks = [Block(4, 1, 32, 8), Block(8, 2, 32), Block(2, 2, 64, 3), Block(5, 1, 20, 12)]
    values = parent.config.to_dict() | {
        "model_type": "gpt_oss_puzzle",
        "block_configs": [block.as_config() for block in blocks],
        "layer_types": ["sliding_attention" if block.window else "full_attention" for block in blocks],
    }
    values.pop("quantization_config", None)
    torch.manual_seed(0)
    config = GptOssPuzzleConfig.from_dict(values)
    config._attn_implementation = "eager"
    model = GptOssPuzzleForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model


@pytest.fixture(params=["parent", "child"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return request.getfixturevalue(request.param)


def draw_prompts(count: int, longest: int = 40) -> list[list[int]]:
    generator = random.Random(0)
    return [[generator.randrange(20, 64) for _ in range(generator.randint(1, longest))] for _ in range(count)]


def one_by_one(model: PreTrainedModel, prompts: Sequence[Sequence[int]], limit: int) -> list[Generated]:
    """The oracle: ``generate`` of transformers, a single request at a time, so without any padding."""
    replies = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        whole = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=limit,
            do_sample=False,
            eos_token_id=sorted(STOPS),
            pad_token_id=0,
        )
        reply = whole[0, len(prompt) :].tolist()
        replies.append(Generated(tuple(reply), reply[-1] not in STOPS))
    return replies


def assert_same_generated(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], found: Sequence[Generated], expected: Sequence[Generated]
) -> None:
    """Token by token, up to a near tie; where the tokens are equal, so is what ended them."""
    assert_same_replies(model, prompts, [one.token_ids for one in found], [one.token_ids for one in expected])
    for one, other in zip(found, expected, strict=True):
        assert one.token_ids != other.token_ids or one.truncated == other.truncated


@pytest.fixture(scope="module")
def expected(parent: PreTrainedModel, child: PreTrainedModel) -> dict[PreTrainedModel, list[Generated]]:
    return {model: one_by_one(model, draw_prompts(12), limit=12) for model in (parent, child)}


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_tokens_are_those_of_transformers(
    model: PreTrainedModel,
    expected: dict[PreTrainedModel, list[Generated]],
    batch_size: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("moesaic.models.generation.PREFILL_TOKENS", 100)
    replies = expected[model]
    found = generate(model, draw_prompts(12), Sampling(12, STOPS), batch_size)
    assert_same_generated(model, draw_prompts(12), found, replies)
    assert len({reply.num_tokens for reply in replies}) > 4
    assert {reply.truncated for reply in replies} == {True, False}


def test_a_reply_outgrows_the_spare_room_of_the_cache(model: PreTrainedModel) -> None:
    """140 tokens are more than twice the spare room; each must be the argmax of a full recompute."""
    prompt = draw_prompts(1)[0]
    (reply,) = generate(model, [prompt], Sampling(140, NEVER), 1)
    assert (reply.num_tokens, reply.truncated) == (140, True)
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *reply.token_ids]])).logits[0, len(prompt) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(reply.token_ids).unsqueeze(1))
    assert_near(chosen.squeeze(1), logits.amax(-1), NEAR_TIE)


def test_cached_logits_equal_a_full_recompute_after_rows_are_dropped(model: PreTrainedModel) -> None:
    prompts = draw_prompts(4)
    with torch.inference_mode():
        decoding = Decoding(model, prompts)
        decoding.step(torch.tensor([30, 31, 32, 33]))
        decoding.keep([1, 3])
        decoding.step(torch.tensor([40, 41]))
        whole = [[*prompts[1], 31, 40], [*prompts[3], 33, 41]]
        full = [model(torch.tensor([tokens])).logits[0, -1] for tokens in whole]
    assert_near(decoding.logits, torch.stack(full))


def test_sampling_follows_its_seed_and_temperature(parent: PreTrainedModel) -> None:
    prompts = draw_prompts(3)

    def draw(temperature: float, seed: int) -> list[Generated]:
        return generate(parent, prompts, Sampling(12, STOPS, temperature, seed), 8)

    assert draw(1.0, 1) == draw(1.0, 1)
    assert draw(1.0, 1) != draw(1.0, 2)
    assert draw(1e-4, 1) == draw(0.0, 0)


def test_long_prompts_come_first_and_every_index_once(parent: PreTrainedModel) -> None:
    prompts = [[30], [30] * 3, [30] * 2]
    batches = generate_batches(parent, prompts, Sampling(1, NEVER), 2)
    assert [[index for index, _ in batch] for batch in batches] == [[1, 2], [0]]
    assert generate(parent, [], Sampling(1, NEVER), 2) == []


def test_requests_that_do_not_fit_are_refused_before_any_work(parent: PreTrainedModel) -> None:
    with pytest.raises(ConfigError, match="prompt 1 has no tokens"):
        generate(parent, [[30], []], Sampling(1, NEVER), 2)
    with pytest.raises(ConfigError, match="500 tokens with a reply of up to 13 does not fit the model's 512 positions"):
        generate(parent, [[30] * 500], Sampling(13, NEVER), 2)


def test_stop_ids_come_from_the_checkpoint(parent: PreTrainedModel) -> None:
    assert stop_ids(parent) == {5}
    parent.generation_config.eos_token_id = [5, 7]
    assert stop_ids(parent) == {5, 7}
    parent.generation_config.eos_token_id = 5


def test_stop_ids_of_a_checkpoint_that_is_not_loaded(tiny_parent: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_parent, tmp_path / "model"))
    assert read_stop_ids(model) == {5}
    (model / "generation_config.json").write_text('{"eos_token_id": [7, 5]}')
    assert read_stop_ids(model) == stop_ids(load_model(model)) == {5, 7}
    (model / "generation_config.json").write_text('{"eos_token_id": 64}')
    with pytest.raises(ArtifactError, match="eos_token_id is 64; the vocabulary has ids 0 to 63"):
        read_stop_ids(model)
    (model / "generation_config.json").unlink()
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    with pytest.raises(ConfigError, match=r"of .* names an eos_token_id: no reply would end"):
        read_stop_ids(model)


def test_requests_that_share_a_prompt_read_it_once(tiny_parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(tiny_parent)
    prompts = [[1, 7, 9], [1, 8], [1, 7, 9], [1, 7, 9]]
    read: list[int] = []
    whole = generation._prefill
    monkeypatch.setattr(
        generation, "_prefill", lambda model, ids, mask: read.append(len(ids)) or whole(model, ids, mask)
    )
    sampling = Sampling(6, frozenset({5}), temperature=1.0)
    replies = generate(model, prompts, sampling, 4)
    assert read == [2]
    assert len({reply.token_ids for reply in replies}) > 2, "each request draws its own tokens"
    greedy = generate(model, prompts, Sampling(6, frozenset({5})), 4)
    alone = [generate(model, [prompt], Sampling(6, frozenset({5})), 1)[0] for prompt in prompts]
    assert_same_generated(model, prompts, greedy, alone)


def test_requests_join_and_leave_a_batch_on_its_way(
    model: PreTrainedModel, expected: dict[PreTrainedModel, list[Generated]]
) -> None:
    """One prompt joins after every second token; rows leave when they are done: each still gets its own tokens."""
    waiting = list(enumerate(draw_prompts(12)))
    replies: list[list[int]] = [[] for _ in waiting]
    rows: list[int] = []
    decoding: Decoding | None = None
    widths = []
    with torch.inference_mode():
        for turn in range(60):
            if waiting and turn % 2 == 0:
                index, prompt = waiting.pop(0)
                fresh = Decoding(model, [prompt])
                if decoding is None:
                    decoding = fresh
                else:
                    decoding.join(fresh)
                rows.append(index)
            if decoding is None:
                continue
            tokens = decoding.logits.argmax(-1)
            for row, token in zip(rows, tokens.tolist(), strict=True):
                replies[row].append(token)
            live = [place for place, row in enumerate(rows) if len(replies[row]) < 12 and replies[row][-1] not in STOPS]
            rows = [rows[place] for place in live]
            if not live:
                decoding = None
                continue
            if len(live) < len(tokens):
                decoding.keep(live)
            decoding.step(tokens[live])
            longest = max(len(draw_prompts(12)[row]) + len(replies[row]) for row in rows)
            widths.append(decoding._length - longest)
    assert_same_replies(model, draw_prompts(12), replies, [reply.token_ids for reply in expected[model]])
    assert min(widths) == 0 and max(widths) < 13, "padding that no row needs is dropped when rows leave"

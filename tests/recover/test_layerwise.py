"""Which layers changed, and which sequences are held out."""

from dataclasses import replace

from moesaic.models.architecture import Block
from moesaic.models.checkpoint import Checkpoint
from moesaic.recover.layerwise import changed_layers, split_held_out


def test_changed_layers_are_those_with_another_block(tiny_checkpoint: Checkpoint):
    whole = tiny_checkpoint.architecture
    blocks = whole.replace(1, Block(4, 1, 64)).replace(3, Block(8, 2, 64, 4))
    assert changed_layers(replace(tiny_checkpoint, architecture=blocks), tiny_checkpoint) == [1, 3]
    assert changed_layers(tiny_checkpoint, tiny_checkpoint) == []


def test_every_tenth_sequence_is_held_out():
    learned, held_out = split_held_out(range(21))
    assert held_out == [0, 10, 20]
    assert sorted(learned + held_out) == list(range(21))
    assert split_held_out("ab") == (["b"], ["a"])

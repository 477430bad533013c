"""The families of models that Moesaic reads, a module each; nothing outside names or guesses their facts.

To add one: a descriptor here, and a folder with the child's config and model class, which travel with every child.
"""

from collections.abc import Mapping

from moesaic.models.families import glm4_moe, gpt_oss, qwen3_moe
from moesaic.models.families.family import Family, Published

FAMILIES: Mapping[str, Family] = {
    model_type: family
    for family in (gpt_oss.GPT_OSS, qwen3_moe.QWEN3_MOE, glm4_moe.GLM4_MOE)
    for model_type in (family.parent_type, family.child_type)
}
"""By the ``model_type`` of their parents and of their children."""
PUBLISHED: Mapping[str, Published] = {**gpt_oss.PUBLISHED, **qwen3_moe.PUBLISHED, **glm4_moe.PUBLISHED}
"""Parents by what their makers call them."""

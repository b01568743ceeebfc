"""Which leaves of a model may be sparse: its kernels, told by their names."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeAlias

Prunable: TypeAlias = Callable[[str, Any], bool]

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
# A word of a leaf's name or of its module's that tells that the leaf is no kernel.
_TABLE_OR_NORM = re.compile(
    "codebooks?|embs?|embeds?|embedders?|embeddings?|positional|w[pt]e|"
    "[bgl]n|rms|.*norm|norms|normali[sz]ation"
)
# A word of the leaf's own name that does.
_PER_NEURON = re.compile("alpha|beta|gamma|bias|biases|offsets?|pos|positions?|scales?")
# The last word of either that does: a token_mixer is a mixer.
_TOKEN = re.compile("bias|encodings?|latents|pos|positions?|tok|tokens?")


def default_prunable(path: str, leaf: Any) -> bool:
    """Whether a leaf is a kernel, going by its rank, its name, and the module that holds it.

    The path's last name is the leaf's own and the one ahead of it the module's, after the numbers
    of lists, Haiku's ``~`` and ``value``, where NNX's own paths end. A name is read by its words:
    ``LayerNorm_0``, ``layer_norm`` and ``layerNorm0`` have the same two.

    Args:
      path: the leaf's path, parts joined by ``/``, for example ``"Dense_0/kernel"``.
      leaf: anything with ``ndim``.

    Returns:
      False for leaves of fewer than two dimensions. True for others whose own name ends in
      ``kernel``, which Flax calls nothing else, and for the rest unless one of these holds:

      - their own name or the module's has a word for embeddings (``embed``, ``emb``,
        ``embedding``, ``embedder``, ``positional``, ``codebook``, ``wte``, ``wpe``) or for
        normalisation (``bn``, ``gn``, ``ln``, ``rms``, ``normalization``, one that ends in
        ``norm``);
      - their own name has ``bias``, ``scale``, ``offset``, ``alpha``, ``beta``, ``gamma``, ``pos``
        or ``position``, or ends in ``cls``;
      - their own name or the module's ends in ``token``, ``pos``, ``position``, ``encoding``,
        ``latents`` or ``bias``.

      Plurals count, parts of words do not: ``upscale`` and ``unbiased`` name kernels.

    Example:
      >>> import jax.numpy as jnp
      >>> import sparseopt_jax as sx
      >>> sx.default_prunable("Dense_0/kernel", jnp.ones((3, 4)))
      True
      >>> sx.default_prunable("wte/weight", jnp.ones((3, 4)))
      False
    """
    if leaf.ndim < 2:
        return False
    # A dict's keys may be paths of their own: ".layers[0].weight", "['Dense_0']['kernel']".
    names = re.findall(r"[\w -]+", path)
    if len(names) > 1 and names[-1] == "value":
        names.pop()
    words = [[word.lower() for word in _WORD.findall(name)] for name in names]
    module, own = ([[], []] + [name for name in words if name])[-2:]
    last = own[-1:]
    if last == ["kernel"]:
        return True
    return not (
        any(map(_TABLE_OR_NORM.fullmatch, module + own))
        or any(map(_PER_NEURON.fullmatch, own))
        or any(map(_TOKEN.fullmatch, module[-1:] + last))
        or last == ["cls"]
    )

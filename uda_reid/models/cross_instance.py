"""X-ReID: training modules in which an image attends to other images of its batch; inference does not need them.

Shen et al., "X-ReID: Cross-Instance Transformer for Identity-Level Person Re-Identification",
https://arxiv.org/abs/2302.02075. Only the idea is taken from the paper; the modules are this package's reading of it.
"""

from typing import NamedTuple

import torch
from timm.layers import LayerNorm, Mlp
from torch import Tensor, nn

from uda_reid.errors import UserError
from uda_reid.models.batch_norm import BNNeck
from uda_reid.retrieval.pairwise import euclidean_distances


class IntraOutput(NamedTuple):
    """Identity-level features of B images.

    Fields:
        embedding: [B, D] float, before the neck: for the triplet loss and as the target of distillation.
        bn_embedding: [B, D] float, after the neck: for the classifier.
        valid: [B] bool, images with another image of their identity in the batch, copies of themselves not counted;
            losses should ignore the rest.
    """

    embedding: Tensor
    bn_embedding: Tensor
    valid: Tensor


class InterOutput(NamedTuple):
    """Features that B anchors read from their hardest positive and hardest negative.

    Fields:
        embedding: [B, D] float, before the neck.
        bn_embedding: [B, D] float, after the neck.
        masses: [B, 2] float, attention on the positive's and on the negative's tokens, mean over heads; sums to 1.
        valid: [B] bool, anchors with both a positive and a negative; losses should ignore the rest.
    """

    embedding: Tensor
    bn_embedding: Tensor
    masses: Tensor
    valid: Tensor


class HardestPairs(NamedTuple):
    """Hardest positive and negative of each anchor.

    Fields:
        positive: [B] int64, index of the farthest other image of the same identity.
        negative: [B] int64, index of the nearest image of another identity.
        valid: [B] bool, anchors that have both; the indices of the others are meaningless.
    """

    positive: Tensor
    negative: Tensor
    valid: Tensor


class CrossInstanceBlock(nn.Module):
    """Pre-norm cross-attention from one image's vector to tokens of other images, and a pre-norm MLP.

    Both have residual connections, so the result stays comparable to the vector.

    Args:
        width: D of the vector.
        channels: C of the tokens.
        heads: attention heads; D must be a multiple.
        mlp_ratio: hidden width of the MLP over D.

    Shape:
        query [B, D] float; tokens [B, N, C] float, or [1, N, C] shared by all queries; mask [B, N] bool, tokens that a
        query may attend to, or None for all; out: [B, D] float and the attention [B, heads, N] float, which sums to 1
        over the tokens, or to 0 where a query may attend to none.
    """

    def __init__(self, width: int, channels: int, heads: int = 8, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        if width % heads:
            raise UserError(f"A vector of width {width} must be a multiple of its {heads} heads: change the heads.")
        self.heads = heads
        self.norm_query = LayerNorm(width)
        self.norm_tokens = LayerNorm(channels)
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(channels, width, bias=False)
        self.value = nn.Linear(channels, width, bias=False)
        self.proj = nn.Linear(width, width)
        self.norm_mlp = LayerNorm(width)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        # A shift common to all images: the necks cancel it, and distances do not see it.
        self.get_parameter("mlp.fc2.bias").requires_grad_(False)

    def forward(self, query: Tensor, tokens: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        normed = self.norm_tokens(tokens)
        q = self.query(self.norm_query(query)).unflatten(-1, (self.heads, -1))
        k = self.key(normed).unflatten(-1, (self.heads, -1))
        v = self.value(normed).unflatten(-1, (self.heads, -1))
        scores = torch.einsum("bhd,bnhd->bhn", q, k) * q.shape[-1] ** -0.5
        # At least float32: a logarithm is taken of masses near zero.
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if mask is not None:
            # The product zeroes queries without any token, for which the softmax alone would be uniform.
            scores = scores.masked_fill(~mask[:, None], torch.finfo(scores.dtype).min)
            attention = scores.softmax(dim=-1) * mask[:, None]
        else:
            attention = scores.softmax(dim=-1)
        attended = torch.einsum("bhn,bnhd->bhd", attention.to(v.dtype), v).flatten(1)
        query = query + self.proj(attended)
        return query + self.mlp(self.norm_mlp(query)), attention


class _CrossInstanceModule(nn.Module):
    """A cross-attention block and a neck; arguments as in `CrossInstanceBlock`."""

    def __init__(self, width: int, channels: int, heads: int = 8, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.block = CrossInstanceBlock(width, channels, heads, mlp_ratio)
        self.neck = BNNeck(width)


class IntraX(_CrossInstanceModule):
    """Identity-level feature of an image: its vector after cross-attention to the other images of its identity.

    Differs from the paper (reading): an image attends to all other images of its identity in the batch at once, and
    never to its own tokens. A sampler repeats images of identities that have fewer than K; a repeated image, though
    augmented otherwise, is not another one.

    Shape:
        embedding [B, D] float; feature_map [B, C, H, W] float; labels [B] int64; indices [B] int64, equal numbers are
        the same image.
    """

    def forward(self, embedding: Tensor, feature_map: Tensor, labels: Tensor, indices: Tensor) -> IntraOutput:
        tokens = feature_map.flatten(2).transpose(1, 2)
        positive = _positives(labels, indices)
        attended, _ = self.block(
            embedding, tokens.flatten(0, 1).unsqueeze(0), positive.repeat_interleave(tokens.shape[1], dim=1)
        )
        return IntraOutput(attended, self.neck(attended), positive.any(dim=1))


class InterX(_CrossInstanceModule):
    """Vector of an anchor after cross-attention to its hardest positive and its hardest negative together.

    The loss on the attention masses trains it to prefer the positive.
    Differs from the paper (reading): hardest by Euclidean distance between embeddings, as in the triplet loss; a
    repeated image is not its own positive.

    Shape:
        embedding [B, D] float; feature_map [B, C, H, W] float; labels [B] int64; indices [B] int64, equal numbers are
        the same image.
    """

    def forward(self, embedding: Tensor, feature_map: Tensor, labels: Tensor, indices: Tensor) -> InterOutput:
        tokens = feature_map.flatten(2).transpose(1, 2)
        hardest = hardest_pairs(embedding.detach(), labels, indices)
        pair = torch.cat([tokens[hardest.positive], tokens[hardest.negative]], dim=1)
        attended, attention = self.block(embedding, pair)
        masses = attention.mean(dim=1).unflatten(1, (2, -1)).sum(dim=2)
        return InterOutput(attended, self.neck(attended), masses, hardest.valid)


def hardest_pairs(embedding: Tensor, labels: Tensor, indices: Tensor) -> HardestPairs:
    """Returns the farthest other image of the same identity and the nearest image of another, for each anchor.

    Args:
        embedding: [B, D] float.
        labels: [B] int64.
        indices: [B] int64, equal numbers are the same image.
    """
    distances = euclidean_distances(embedding)
    positive, negative = _positives(labels, indices), labels[:, None] != labels[None]
    farthest = distances.masked_fill(~positive, -1).argmax(dim=1)
    nearest = distances.masked_fill(~negative, torch.inf).argmin(dim=1)
    return HardestPairs(farthest, nearest, positive.any(dim=1) & negative.any(dim=1))


def _positives(labels: Tensor, indices: Tensor) -> Tensor:
    """Returns which images are another image of the same identity, [B, B] bool."""
    return (labels[:, None] == labels[None]) & (indices[:, None] != indices[None])

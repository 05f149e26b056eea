"""FusionReID: a convolutional and a transformer trunk whose query tokens attend to each other's maps.

Wang et al., "Unity is Strength: Unifying Convolutional and Transformeral Features for Better Person
Re-Identification", https://arxiv.org/abs/2412.17239, code: https://github.com/924973292/FusionReID
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm, Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from uda_reid.errors import UserError
from uda_reid.models.backbone import BackboneOutput
from uda_reid.models.pooling import GeM
from uda_reid.models.trunks import CnnTrunk, VitTrunk


class LRU(nn.Module):
    """Local Refinement Unit: a depth-separable convolution from a branch's map to the common width.

        depthwise convolution, batch norm, PReLU, pointwise convolution, batch norm, PReLU

    The convolutions have biases, as in the released code, but they are frozen: the batch norms cancel them. Each PReLU
    has one slope.

    Args:
        channels: C of the branch.
        dim: D of the refined map.
        kernel: odd side of the depthwise kernel; 1 as released.

    Shape:
        in [B, C, h, w] float, out [B, D, h, w] float.
    """

    def __init__(self, channels: int, dim: int, kernel: int = 1) -> None:
        super().__init__()
        if kernel < 1 or kernel % 2 == 0:
            raise UserError(f"The kernel of the local refinement unit must be odd, got {kernel}: use 1 or 3.")
        self.depthwise = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels)
        self.norm_depthwise = nn.BatchNorm2d(channels)
        self.act_depthwise = nn.PReLU()
        self.pointwise = nn.Conv2d(channels, dim, 1)
        self.norm_pointwise = nn.BatchNorm2d(dim)
        self.act_pointwise = nn.PReLU()
        _freeze(self, "depthwise.bias", "pointwise.bias")

    def forward(self, feature_map: Tensor) -> Tensor:
        refined = self.act_depthwise(self.norm_depthwise(self.depthwise(feature_map)))
        return self.act_pointwise(self.norm_pointwise(self.pointwise(refined)))


class SharedEncodingUnit(nn.Module):
    """SEU: self-attention among a branch's query token and patch tokens.

    One pre-norm transformer block (queries, keys and values without bias) and a final layer norm.

    Shape:
        in and out [B, 1 + h * w, D] float.
    """

    def __init__(self, dim: int, heads: int = 12, mlp_ratio: float = 4.0, norm_eps: float = 1e-6) -> None:
        super().__init__()
        norm: Any = partial(LayerNorm, eps=norm_eps)  # timm asks for a class, but calls it like any function
        self.block = Block(dim, heads, mlp_ratio=mlp_ratio, qkv_bias=False, norm_layer=norm)
        self.norm = norm(dim)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.norm(self.block(tokens))


class MutualFusionUnit(nn.Module):
    """MFU: cross-attention from one branch's query token to the other branch's encoded patch tokens.

    Pre-norm cross-attention, in which the patch tokens are normed for the keys but not for the values, and a pre-norm
    MLP, each with a residual connection.

    Shape:
        query [B, 1, D] float, tokens [B, h * w, D] float, out [B, 1, D] float.
    """

    def __init__(self, dim: int, heads: int = 12, mlp_ratio: float = 4.0, norm_eps: float = 1e-6) -> None:
        super().__init__()
        self.heads = heads
        self.norm_query = LayerNorm(dim, norm_eps)
        self.norm_key = LayerNorm(dim, norm_eps)
        # A shift common to all keys does not change the softmax, so this one could never be trained.
        _freeze(self, "norm_key.bias")
        self.query = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.proj = nn.Linear(dim, dim)
        self.norm_mlp = LayerNorm(dim, norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, query: Tensor, tokens: Tensor) -> Tensor:
        attended = F.scaled_dot_product_attention(
            self._split(self.query(self.norm_query(query))),
            self._split(self.key(self.norm_key(tokens))),
            self._split(self.value(tokens)),
        )
        query = query + self.proj(attended.transpose(1, 2).flatten(2))
        return query + self.mlp(self.norm_mlp(query))

    def _split(self, tokens: Tensor) -> Tensor:
        """Reshapes [B, N, D] to [B, heads, N, D / heads]."""
        return tokens.unflatten(2, (self.heads, -1)).transpose(1, 2)


class HeterogenousTransmissionModule(nn.Module):
    """HTM: encodes both branches, then each query token attends to the other branch.

    Args:
        dim: D of the tokens.
        shared_encoder: one SEU for both branches (paper) or one for each (the released code's default).
        seu: False leaves the encoding out, so the MFUs attend to the tokens as they come.
        mfu: False leaves the fusion out, so the encoded query tokens are the result.
        norm_eps: of every layer norm.
        last: freezes the last bias before the result, as no loss on the result depends on it: batch norms and
            distances between images do not change with a shift that all images share.

    Shape:
        queries [B, 1, D] float and patch tokens [B, h * w, D] float of the two branches, whose grids may differ;
        out: the two queries, [B, 1, D] float each.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 12,
        mlp_ratio: float = 4.0,
        *,
        shared_encoder: bool = True,
        seu: bool = True,
        mfu: bool = True,
        norm_eps: float = 1e-6,
        last: bool = False,
    ) -> None:
        super().__init__()
        if not (seu or mfu):
            raise UserError("A transmission module needs seu or mfu, got neither: use layers = 0 to leave it out.")
        encoders = (1 if shared_encoder else 2) if seu else 0
        self.seu = nn.ModuleList(SharedEncodingUnit(dim, heads, mlp_ratio, norm_eps) for _ in range(encoders))
        self.mfu_cnn = MutualFusionUnit(dim, heads, mlp_ratio, norm_eps) if mfu else None
        self.mfu_transformer = MutualFusionUnit(dim, heads, mlp_ratio, norm_eps) if mfu else None
        if last:
            outputs = (
                ("mfu_cnn.mlp.fc2", "mfu_transformer.mlp.fc2") if mfu else (f"seu.{i}.norm" for i in range(encoders))
            )
            _freeze(self, *(f"{output}.bias" for output in outputs))

    def forward(
        self, cnn_query: Tensor, transformer_query: Tensor, cnn_tokens: Tensor, transformer_tokens: Tensor
    ) -> tuple[Tensor, Tensor]:
        if self.seu:
            cnn = self.seu[0](torch.cat([cnn_query, cnn_tokens], dim=1))
            transformer = self.seu[-1](torch.cat([transformer_query, transformer_tokens], dim=1))
            cnn_query, cnn_tokens = cnn[:, :1], cnn[:, 1:]
            transformer_query, transformer_tokens = transformer[:, :1], transformer[:, 1:]
        if self.mfu_cnn is None or self.mfu_transformer is None:
            return cnn_query, transformer_query
        return self.mfu_cnn(cnn_query, transformer_tokens), self.mfu_transformer(transformer_query, cnn_tokens)


class FusionReID(nn.Module):
    """Dual-branch feature extraction and dual-attention mutual fusion, section 3 of the paper.

    Differs from the paper: parameters that no loss on the vectors depends on are frozen. `shared_encoder=False` is the
    released default.

    Args:
        cnn, transformer: trunks of the two branches.
        lru: False replaces each LRU by a linear projection to D. Its bias is trained: GeM is not linear in it.
        width, layers, heads, mlp_ratio, shared_encoder, lru_kernel, seu, mfu, norm_eps: see
            `settings.FusionSettings`.

    Shape:
        vectors "cnn" [B, C], "transformer" [B, D_t], and "cnn_query", "transformer_query", "cnn_fused",
        "transformer_fused" [B, D]; maps F_c [B, D, 16, 8] and F_t [B, D, 21, 10] for a ResNet and a patch stride of 12
        at 256x128, each on its own grid.

    Raises:
        UserError: the sizes contradict each other, or neither SEU nor MFU is left in an HTM.
    """

    def __init__(
        self,
        cnn: CnnTrunk,
        transformer: VitTrunk,
        *,
        width: int = 768,
        layers: int = 2,
        heads: int = 12,
        mlp_ratio: float = 4.0,
        shared_encoder: bool = True,
        lru: bool = True,
        lru_kernel: int = 1,
        seu: bool = True,
        mfu: bool = True,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if not 0 <= layers <= 6:
            raise UserError(f"FusionReID stacks 0 to 6 transmission modules, got {layers}: choose a number between.")
        if width % heads:
            raise UserError(
                f"The width {width} of FusionReID must be a multiple of its {heads} heads: change one of them."
            )
        self.cnn = cnn
        self.transformer = transformer
        self.lru_cnn, self.lru_transformer = (
            LRU(trunk.channels, width, lru_kernel) if lru else nn.Conv2d(trunk.channels, width, 1)
            for trunk in (cnn, transformer)
        )
        self.gem = nn.ModuleDict({name: GeM() for name in ("cnn", "cnn_query", "transformer_query")})
        self.htm = nn.ModuleList(
            HeterogenousTransmissionModule(
                width,
                heads,
                mlp_ratio,
                shared_encoder=shared_encoder,
                seu=seu,
                mfu=mfu,
                norm_eps=norm_eps,
                last=index == layers - 1,
            )
            for index in range(layers)
        )
        if lru and not layers:
            # This slope scales negative values only, which GeM clamps, and without HTM no vector has another source.
            _freeze(self, "lru_cnn.act_pointwise.weight", "lru_transformer.act_pointwise.weight")
        fused = ("cnn_fused", "transformer_fused") if layers else ()
        self.output_names = ("cnn", "transformer", "cnn_query", "transformer_query", *fused)
        self.output_widths = (cnn.channels, transformer.channels, width, width, *(width for _ in fused))
        self.map_channels = 2 * width
        self.grad_checkpointing = False

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Computes the activations of the HTMs again in the backward pass; the trunks have switches of their own."""
        self.grad_checkpointing = enable

    def forward(self, images: Tensor, camera_ids: Tensor | None = None) -> BackboneOutput:
        cnn_map = self.cnn(images)
        class_token, transformer_map = self.transformer(images, camera_ids)
        cnn_refined = self.lru_cnn(cnn_map)
        transformer_refined = self.lru_transformer(transformer_map)
        cnn_query = self.gem["cnn_query"](cnn_refined)
        transformer_query = self.gem["transformer_query"](transformer_refined)
        vectors: tuple[Tensor, ...] = (self.gem["cnn"](cnn_map), class_token, cnn_query, transformer_query)

        if self.htm:
            # Only the query tokens are passed up the stack: every module gets the refinement units' own tokens.
            cnn_tokens = cnn_refined.flatten(2).transpose(1, 2)
            transformer_tokens = transformer_refined.flatten(2).transpose(1, 2)
            cnn_fused, transformer_fused = cnn_query.unsqueeze(1), transformer_query.unsqueeze(1)
            for htm in self.htm:
                run = partial(checkpoint, htm, use_reentrant=False) if self.grad_checkpointing else htm
                cnn_fused, transformer_fused = run(cnn_fused, transformer_fused, cnn_tokens, transformer_tokens)
            vectors += (cnn_fused[:, 0], transformer_fused[:, 0])
        return BackboneOutput(vectors, (cnn_refined, transformer_refined))


def _freeze(module: nn.Module, *names: str) -> None:
    for name in names:
        module.get_parameter(name).requires_grad_(False)

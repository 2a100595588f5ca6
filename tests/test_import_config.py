"""Settings of sd-scripts and of diffusers' examples, as their users write them, in our terms."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import load_params
from pipeline.errors import UserError
from pipeline.import_config import import_config

PRESETS = Path(__file__).parent.parent / "presets"
KOHYA = """
pretrained_model_name_or_path = "runwayml/stable-diffusion-v1-5"
output_name = "my style"
output_dir = "out"
network_module = "networks.lora"

[additional_network_arguments]
network_dim = 32
network_alpha = 16
unet_lr = 1e-4
text_encoder_lr = 5e-5
learning_rate = 2e-4

[optimizer_arguments]
optimizer_type = "AdamW8bit"
lr_scheduler = "cosine_with_restarts"
lr_scheduler_num_cycles = 3
lr_warmup_steps = 100
max_grad_norm = 1.0

[training_arguments]
max_train_epochs = 10
train_batch_size = 2
gradient_accumulation_steps = 4
mixed_precision = "bf16"
save_precision = "fp16"
seed = 42
clip_skip = 2
min_snr_gamma = 5
noise_offset = 0.1
xformers = true
lowram = true

[dataset_arguments]
cache_latents = true

[[datasets]]
resolution = "512,512"
enable_bucket = true
min_bucket_reso = 320
max_bucket_reso = 960
bucket_reso_steps = 64
flip_aug = true
shuffle_caption = true
keep_tokens = 1
  [[datasets.subsets]]
  image_dir = "data/train"
"""
DIFFUSERS = """
export MODEL_NAME="stabilityai/stable-diffusion-xl-base-1.0"
export OUTPUT_DIR="out"

accelerate launch --mixed_precision="fp16" train_text_to_image_lora_sdxl.py \\
  --pretrained_model_name_or_path=$MODEL_NAME \\
  --train_data_dir="pictures of mine" --caption_column="text" \\
  --resolution=1024 --random_flip \\
  --train_batch_size=1 --gradient_accumulation_steps 4 \\
  --max_train_steps=1500 --learning_rate=1e-04 --lr_scheduler="constant" --lr_warmup_steps=0 \\
  --rank=8 --seed=42 --snr_gamma=5.0 --checkpointing_steps=500 \\
  --validation_prompt="cute dragon creature" --report_to="wandb" \\
  --output_dir=${OUTPUT_DIR} --enable_npu_flash_attention
"""

AI_TOOLKIT = """
---
job: extension
config:
  name: "my_first_lora_v1"
  process:
    - type: 'sd_trainer'
      training_folder: "output"
      device: cuda:0
      trigger_word: "p3r5on"
      network: {type: lora, linear: 16, linear_alpha: 8}
      save: {dtype: float16, save_every: 250, max_step_saves_to_keep: 4}  # not for FLUX
      datasets:
        - folder_path: "/path/to/images"
          caption_ext: "txt"
          caption_dropout_rate: 0.05
          shuffle_tokens: false
          cache_latents_to_disk: true
          resolution: [512, 768, 1024]
        - folder_path: "/path/to/others"
      train:
        batch_size: 2
        steps: 2000
        gradient_accumulation_steps: 3
        train_unet: true
        train_text_encoder: false
        gradient_checkpointing: true
        noise_scheduler: ddpm
        optimizer: adamw8bit
        lr: 1e-4
        ema_config: {use_ema: true, ema_decay: 0.99}
        dtype: bf16
      model: {name_or_path: stabilityai/stable-diffusion-xl-base-1.0, is_xl: true, quantize: false}
      sample:
        sampler: ddpm
        sample_every: 250
        width: 1024
        prompts: ["[trigger] holding a sign", "a bear"]
        neg: ""
        seed: 42
        guidance_scale: 4
        sample_steps: 20
meta: {name: "[name]", version: '1.0'}
"""


def test_ai_toolkits_yaml(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(AI_TOOLKIT)
    made = import_config(tmp_path / "job.yaml", PRESETS, tmp_path / "params.yaml")
    p = load_params(tmp_path / "params.yaml")
    assert (p.model.family, p.model.base, p.export.name) == (
        "sdxl",
        "stabilityai/stable-diffusion-xl-base-1.0",
        "my_first_lora_v1",
    )
    assert (p.lora.rank, p.lora.alpha, p.lora.text_encoder, p.export.dtype) == (16, 8.0, False, "float16")
    assert (p.dataset.path, p.dataset.trigger, p.dataset.resolution) == ("/path/to/images", "p3r5on", 1024)
    assert p.dataset.buckets and p.dataset.buckets.max_side == 2048
    assert (p.train.batch_size, p.runtime.micro_batch, p.train.steps, p.train.learning_rate) == (6, 2, 2000, 1e-4)
    assert (p.train.optimiser, p.train.ema_decay, p.train.mixed_precision) == ("adamw8bit", 0.99, "bf16")
    assert (p.train.warmup_steps, p.train.caption_dropout, p.train.snapshot_every) == (0, 0.05, 250)
    assert p.validate_.prompts == ("p3r5on holding a sign", "a bear") and p.validate_.seeds == (42,)
    assert (p.validate_.guidance_scale, p.validate_.inference_steps, p.runtime.gradient_checkpointing) == (4.0, 20, True)
    assert made.dropped == [
        "datasets 2 and on 1 more: see dataset.concepts",
        "datasets.resolution [512, 768, 1024]: one size is trained on, the largest",
        "sample.sampler ddpm",
        "train.noise_scheduler ddpm",
    ]


def test_ai_toolkits_own_defaults(tmp_path: Path) -> None:
    (tmp_path / "job.yml").write_text("config: {process: [{type: sd_trainer, model: {name_or_path: me/sd15}}]}")
    import_config(tmp_path / "job.yml", PRESETS, tmp_path / "params.yaml")
    p = load_params(tmp_path / "params.yaml")
    assert (p.model.family, p.lora.rank, p.lora.alpha, p.train.warmup_steps) == ("sd", 4, 1.0, 0)


def test_kohyas_toml(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(KOHYA.replace("my style", "my-style"))
    made = import_config(tmp_path / "config.toml", PRESETS, tmp_path / "params.yaml")
    p = load_params(tmp_path / "params.yaml")
    assert p.model.family == "sd" and p.model.base == "runwayml/stable-diffusion-v1-5" and p.export.name == "my-style"
    assert (p.lora.rank, p.lora.alpha, p.lora.text_encoder) == (32, 16.0, True)
    assert (p.train.learning_rate, p.train.text_encoder_learning_rate) == (1e-4, 5e-5)
    assert (p.train.optimiser, p.train.schedule, p.train.schedule_cycles, p.train.warmup_steps) == (
        "adamw8bit",
        "cosine-with-restarts",
        3,
        100,
    )
    assert (p.train.epochs, p.train.steps, p.train.batch_size, p.runtime.micro_batch) == (10, None, 8, 2)
    assert (p.train.mixed_precision, p.train.seed, p.train.min_snr_gamma, p.train.noise_offset) == ("bf16", 42, 5.0, 0.1)
    assert p.encode.clip_skip == 1 and p.encode.flip and p.export.dtype == "float16"
    assert p.dataset.path == "data/train" and p.dataset.resolution == 512
    assert p.dataset.buckets and (p.dataset.buckets.step, p.dataset.buckets.min_side, p.dataset.buckets.max_side) == (
        64,
        320,
        960,
    )
    assert p.dataset.shuffle_tags and p.dataset.keep_tags == 1
    assert made.dropped == ["lowram True"]
    assert "cache_latents: latents are always cached, by content" in made.carried
    assert "# inner dimension" in (tmp_path / "params.yaml").read_text()  # a preset's comments


def test_clip_skip_is_nothing_for_sdxl(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("clip_skip = 2")
    made = import_config(tmp_path / "config.toml", PRESETS, tmp_path / "params.yaml", "sdxl")
    assert load_params(tmp_path / "params.yaml").encode.clip_skip == 0
    assert [line.partition(":")[0] for line in made.dropped] == ["clip_skip 2"]


def test_the_diffusers_scripts_command_line(tmp_path: Path) -> None:
    (tmp_path / "train.sh").write_text(DIFFUSERS)
    made = import_config(tmp_path / "train.sh", PRESETS, tmp_path / "params.yaml")
    p = load_params(tmp_path / "params.yaml")
    assert p.model.family == "sdxl" and p.model.base == "stabilityai/stable-diffusion-xl-base-1.0"
    assert p.dataset.path == "pictures of mine" and p.dataset.caption_column == "text" and p.encode.flip
    assert (p.lora.rank, p.lora.alpha) == (8, 8.0)  # the script has no alpha
    assert (p.train.steps, p.train.batch_size, p.runtime.micro_batch) == (1500, 4, 1)
    assert p.validate_.prompts == ("cute dragon creature",) and p.runtime.checkpoint_every == 500
    assert p.train.mixed_precision == "fp16"  # the launcher's
    assert made.dropped == [
        "enable_npu_flash_attention True",
        "lr_warmup_steps 0: their constant schedule has no warm-up; constant_with_warmup has",
    ]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.toml", "a = ", "not valid TOML"),
        ("a.sh", "echo hello", "neither a .toml of sd-scripts, a .yaml of ai-toolkit, nor"),
        ("a.sh", "python train_x.py --a='b", "cannot be read"),
        ("a.toml", "network_dim = 0", "lora.rank"),
        ("a.sh", "python train_dreambooth_lora_flux.py --rank=4", "it names flux"),
        ("a.yaml", "config: [", "not valid YAML"),
        ("a.yaml", "dataset: {path: data}", "not a job of ai-toolkit"),
        (
            "a.yaml",
            "config: {process: [{type: sd_trainer, model: {name_or_path: b/FLUX.1-dev, is_flux: true}}]}",
            "it names FLUX",
        ),
        (
            "a.yaml",
            "config: {process: [{type: sd_trainer, model: {name_or_path: a/b, arch: wan21}}]}",
            "model.arch wan21: settings for",
        ),
    ],
)
def test_what_cannot_be_translated_is_said(tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=said):
        import_config(tmp_path / name, PRESETS, tmp_path / "params.yaml")
    assert not (tmp_path / "params.yaml").exists()


def test_values_without_an_equivalent_are_listed_and_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('optimizer_type = "DAdaptation"\nresolution = "512,768"\n[[datasets]]\n[[datasets]]\n')
    made = import_config(tmp_path / "a.toml", PRESETS, tmp_path / "params.yaml")
    assert [line.split(":")[0] for line in made.dropped] == [
        "datasets 2 and on 1 more",
        "optimizer_type DAdaptation",
        "resolution 512,768",
    ]
    with pytest.raises(UserError, match="exists"):
        import_config(tmp_path / "a.toml", PRESETS, tmp_path / "params.yaml")


def test_what_other_trainers_mean_by_default(tmp_path: Path) -> None:
    """sd-scripts: α is 1, epochs override steps, the text encoder learns too, and a constant schedule has no warm-up."""
    text = (
        'max_train_steps = 100\nmax_train_epochs = 3\nlr_warmup_steps = 50\nnetwork_dim = 8\nhuggingface_token = "hf_secret"\n'
    )
    (tmp_path / "a.toml").write_text(text)
    made = import_config(tmp_path / "a.toml", PRESETS, tmp_path / "params.yaml")
    p = load_params(tmp_path / "params.yaml")
    assert (p.lora.rank, p.lora.alpha, p.lora.text_encoder) == (8, 1.0, True)
    assert (p.train.epochs, p.train.steps, p.train.warmup_steps) == (3, None, 0)
    assert "huggingface_token (not shown)" in made.dropped and not any(
        "hf_secret" in line for line in made.dropped + made.carried
    )
    (tmp_path / "b.sh").write_text("# train_dreambooth_lora.py, with my dog\npython train_dreambooth_lora.py --rank=2 # mine\n")
    import_config(tmp_path / "b.sh", PRESETS, tmp_path / "b.yaml")
    assert load_params(tmp_path / "b.yaml").lora.rank == 2

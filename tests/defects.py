"""Puts defects that other trainers have or had, and this project must not have, back into a copy of it, one at a time, and shows that
a test fails.

    make defects                      # six minutes on two cores
    python tests/defects.py 1 9       # those of these numbers

A defect that no test sees ends it with 1: the test has gone blind.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from project import copy_of_what_is_tracked


@dataclass(frozen=True)
class Defect:
    """What to write instead of what, and the test that must fail for it."""

    number: int  # the same for several forms of one defect
    what: str
    file: str
    right: str
    wrong: str
    test: str


DEFECTS = (
    Defect(
        1,
        "clipping is given an iterator that is used up",
        "pipeline/train.py",
        "accelerator.clip_grad_norm_(parameters, settings.max_grad_norm)",
        "accelerator.clip_grad_norm_(iter(()), settings.max_grad_norm)",
        "test_train.py::test_clipping_clips",
    ),
    Defect(
        2,
        "the adapter is in the base's bfloat16",
        "pipeline/lora.py",
        "parameter.data = parameter.data.float()",
        "parameter.data = parameter.data.bfloat16()",
        "test_train.py::test_weights_are_float32_and_all_move_under_bf16",
    ),
    Defect(
        3,
        "the caption is no part of a text's key",
        "pipeline/encodings.py",
        '["text", SCHEMA, caption, reading]',
        '["text", SCHEMA, reading]',
        "test_encodings.py::test_an_edited_caption_costs_one_text_and_no_picture",
    ),
    Defect(
        3,
        "the pixels are no part of a picture's key",
        "pipeline/encodings.py",
        '["latents", SCHEMA, pixels, geometry, flipped, vae, dtype]',
        '["latents", SCHEMA, geometry, flipped, vae, dtype]',
        "test_encodings.py::test_new_pixels_under_an_old_name_cost_one_picture",
    ),
    Defect(
        4,
        "a picture has one posterior sample for good",
        "pipeline/batches.py",
        "posterior = _normal(self.seed, Purpose.POSTERIOR, step, positions, shape)",
        "posterior = _normal(self.seed, Purpose.POSTERIOR, 0, positions, shape)",
        "test_batches.py::test_every_step_draws_the_posterior_and_the_flip_anew",
    ),
    Defect(
        4,
        "no flip once latents are stored",
        "pipeline/batches.py",
        "return int(draw(self.seed, Purpose.FLIP, step, position).integers(len(sample.latents)))",
        "return 0",
        "test_batches.py::test_every_step_draws_the_posterior_and_the_flip_anew",
    ),
    Defect(
        5,
        "latents beside other pictures' captions",
        "pipeline/batches.py",
        "texts = [self.encodings.text(key) for _, key in chosen]",
        "texts = [self.encodings.text(key) for _, key in reversed(chosen)]",
        "test_batches.py::test_latents_and_captions_stay_together",
    ),
    Defect(
        6,
        "going on starts the order of the data again",
        "pipeline/train.py",
        "batches, settings, step, start, last, accelerator.device, live, hardware",
        "batches, settings, step - first, start, last, accelerator.device, live, hardware",
        "test_train.py::test_stopping_and_going_on_changes_no_bit",
    ),
    Defect(
        6,
        "going on draws another dropout",
        "pipeline/train.py",
        "torch.manual_seed(torch_seed(settings.seed, step + 1))",
        "torch.manual_seed(torch_seed(settings.seed, step - first + 1))",
        "test_train.py::test_stopping_and_going_on_changes_no_bit",
    ),
    Defect(
        6,
        "going on forgets the optimiser's state",
        "pipeline/train.py",
        "    optimiser.load_state_dict(",
        "    (lambda state: None)(",
        "test_train.py::test_stopping_and_going_on_changes_no_bit",
    ),
    Defect(
        7,
        "alpha is not in the file",
        "pipeline/export/kohya_format.py",
        'tensors[f"{start}.alpha"] = torch.tensor(plain.alpha, dtype=torch.float32)',
        "pass",
        "test_kohya.py::test_loaders_compute_what_peft_computes",
    ),
    Defect(
        8,
        "every adapter is called one of SD 1",
        "pipeline/export/metadata.py",
        '"ss_base_model_version": facts.version.kohya,',
        '"ss_base_model_version": "sd_v1",',
        "test_export_stage.py::test_the_files_of_an_sdxl_say_that_they_are",
    ),
    Defect(
        9,
        "the micro-conditioning is rounded",
        "pipeline/families/sdxl.py",
        '"time_ids": geometry}',
        '"time_ids": geometry.to(torch.bfloat16)}',
        "test_families.py::test_sdxl_geometry_reaches_the_network_unrounded",
    ),
    Defect(
        9,
        "the crop is not mirrored with the picture",
        "pipeline/encoders.py",
        "crop_left = g.resized[0] - right if wanted.flipped else left",
        "crop_left = left",
        "test_encodings.py::test_flips_are_a_second_latent_and_mirror_the_geometry",
    ),
    Defect(
        10,
        "no warm-up under a constant schedule",
        "pipeline/optim.py",
        "if step < warmup_steps:",
        'if step < warmup_steps and schedule != "constant":',
        "test_formulas.py::test_warmup_rises_under_every_schedule_and_never_wastes_a_step",
    ),
    Defect(
        10,
        "the schedule runs as much faster as there are processes",
        "pipeline/train.py",
        'group["lr"] = rates(step) * share',
        'group["lr"] = rates(min(steps - 1, step * team.size)) * share',
        "test_together.py::test_two_processes_train_what_one_trains",
    ),
    Defect(
        11,
        "a loss that is no number counts as zero",
        "pipeline/train.py",
        "part = part / len(members)",
        "part = torch.nan_to_num(part, 0.0, 0.0, 0.0) / len(members)",
        "test_train.py::test_a_loss_that_is_not_finite_stops_names_step_and_samples_and_keeps_the_checkpoint",
    ),
    Defect(
        12,
        "errors are swallowed, and the stage ends with 0",
        "pipeline/stage.py",
        "            body(stage)\n",
        "            with contextlib.suppress(Exception):\n                body(stage)\n",
        "test_stage.py::test_a_bug_shows_a_traceback_and_leaves_the_old_outs",
    ),
    Defect(
        13,
        "a size's last pictures are dropped",
        "pipeline/batches.py",
        "for i in range(0, len(shuffled), batch_size)]",
        "for i in range(0, len(shuffled) - batch_size + 1, batch_size)]",
        "test_batches.py::test_an_epoch_shows_everything_once_and_mixes_no_sizes",
    ),
    Defect(
        14,
        "unknown keys are ignored",
        "pipeline/config.py",
        'extra="forbid"',
        'extra="ignore"',
        "test_config.py::test_unknown_key_names_the_nearest_and_its_line",
    ),
    Defect(
        15,
        "the card has a licence that nobody chose",
        "stages/export_and_card.py",
        '    card_header = {\n        "license": settings.license,',
        '    card_header = {\n        "license": "creativeml-openrail-m",',
        "test_export_stage.py::test_the_card_passes_the_hubs_own_checks",
    ),
    Defect(
        16,
        "masks are cut by the denoiser's stride, and not to their latents",
        "pipeline/encoders.py",
        "store, model.pixels_per_cell(), check_stop)",
        "store, family.stride, check_stop)",
        "test_encodings.py::test_masks_come_resized_and_mirrored_with_their_latents",
    ),
)


def main() -> None:
    """One line a defect; ends with 1 where one was not seen."""
    wanted = {int(number) for number in sys.argv[1:]}
    unseen = 0
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / "copy"
        copy_of_what_is_tracked(copy)
        chosen = [d for d in DEFECTS if not wanted or d.number in wanted]
        for test in dict.fromkeys(defect.test for defect in chosen):
            assert not _fails(copy, test), f"{test} fails without any defect: it sees nothing"
        for defect in chosen:
            file, start = copy / defect.file, time.monotonic()
            text = file.read_text(encoding="utf-8")
            assert text.count(defect.right) == 1, f"{defect.file} does not hold once: {defect.right}"
            file.write_text(text.replace(defect.right, defect.wrong), encoding="utf-8")
            failed = _fails(copy, defect.test)
            file.write_text(text, encoding="utf-8")
            unseen += not failed
            verdict = "seen" if failed else "NOT SEEN"
            print(
                f"{defect.number:>3}  {verdict:<9}{time.monotonic() - start:5.0f} s  {defect.what}  ({defect.test})", flush=True
            )
    sys.exit(1 if unseen else 0)


def _fails(copy: Path, test: str) -> bool:
    """Whether the test fails there; an error of its making, or none that was run, is no answer."""
    command = [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", "-m", "slow or not slow", f"tests/{test}"]
    environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1) and " error" not in done.stdout.splitlines()[-1], done.stdout[-3000:] + done.stderr[-3000:]
    return done.returncode == 1


if __name__ == "__main__":
    main()

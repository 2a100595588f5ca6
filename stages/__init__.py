"""One thin module per stage: parameters in, library calls, declared outs."""

from __future__ import annotations

from importlib import import_module

from pipeline.progress import say
from pipeline.stage import Stage, run_stage

# stage name -> module; the order is the pipeline's
STAGES = {
    "prepare-dataset": "stages.prepare_dataset",
    "precompute-latents-and-embeddings": "stages.precompute_latents_and_embeddings",
    "train-lora": "stages.train_lora",
    "validate": "stages.validate",
    "export-and-card": "stages.export_and_card",
}
_MIRRORED = ("train-lora", "validate", "export-and-card")


def run(name: str) -> None:
    """Run one stage. Its module, and torch with it, is imported only when its inputs are known to be in order."""

    def body(stage: Stage) -> None:
        import_module(STAGES[name]).main(stage)

    def mirrored(stage: Stage) -> None:
        from pipeline.tracking import mirror

        if name == "export-and-card":
            from pipeline.page.report import write_page

            try:
                say(f"  the page to look at: {write_page(stage.workspace)}")
            except Exception as error:  # what is to be kept is written: a page can be made again
                say(f"  the page could not be made: {error}; `reprolora report` tries again")
        mirror(stage)

    run_stage(name, body, after=mirrored if name in _MIRRORED else None)

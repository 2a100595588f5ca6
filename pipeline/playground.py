"""`cli.py play`: the base beside the base with adapters, in a browser. Gradio, the extra `ui`."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.progress import say
from pipeline.studio import Studio, Wish, known_adapters, save
from pipeline.workspace import Workspace

_SLOTS = 3  # adapters at once


def play(workspace: Workspace, host: str, port: int) -> None:
    """Serve the playground until Ctrl-C.

    Raises:
        UserError: gradio is not installed.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio
    except ImportError as error:
        raise UserError(f"play needs gradio, which cannot be imported ({error}): pip install 'reprolora[ui]'") from None
    studio = Studio(workspace)
    page = _page(gradio, studio, known_adapters(workspace), Path(tempfile.mkdtemp(prefix="reprolora-play-")))
    say(f"playground on http://{host}:{port} (Ctrl-C ends it)")
    page.launch(server_name=host, server_port=port, quiet=True, show_error=True, theme=_theme(gradio))


def _theme(gradio: Any) -> Any:
    return gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])  # none from a CDN


def _page(gradio: Any, studio: Studio, adapters: dict[str, str], folder: Path) -> Any:
    asked = studio.params.validate_

    def draw(prompt: str, negative: str, seed: float, steps: float, guidance: float, *slots: Any) -> tuple[Any, ...]:
        chosen = []
        for name, file, weight in zip(slots[:_SLOTS], slots[_SLOTS : 2 * _SLOTS], slots[2 * _SLOTS :], strict=True):
            path = (file or "").strip() or adapters.get(name or "", "")
            if path:
                chosen.append((path, float(weight)))
        wish = Wish(prompt, negative, int(seed), int(steps), float(guidance), tuple(chosen))
        try:
            before, after = studio.draw(wish)
        except (UserError, ValueError, OSError) as error:
            raise gradio.Error(str(error), duration=None) from error
        return before, after, str(save(after, wish, folder / f"seed{wish.seed}.png"))

    with gradio.Blocks(title=f"reprolora: {studio.params.export.name}", analytics_enabled=False) as page:
        gradio.Markdown(f"# {studio.params.export.title or studio.params.export.name}")
        with gradio.Row():
            with gradio.Column():
                prompt = gradio.Textbox(asked.prompts[0], label="Prompt", lines=3)
                negative = gradio.Textbox(asked.negative_prompt, label="Negative prompt")
                with gradio.Row():
                    seed = gradio.Number(asked.seeds[0], label="Seed", precision=0, minimum=0)
                    steps = gradio.Slider(1, 100, asked.inference_steps, step=1, label="Steps")
                    guidance = gradio.Slider(1, 20, asked.guidance_scale, step=0.5, label="Guidance")
                names, files, weights = [], [], []
                for place in range(_SLOTS):
                    with gradio.Row():
                        first = next(iter(adapters), None) if place == 0 else None
                        label = f"Adapter {place + 1}"
                        names.append(gradio.Dropdown(list(adapters), value=first, label=label, scale=3))
                        files.append(gradio.Textbox("", label="or a file", scale=2))
                        weights.append(gradio.Slider(-1, 2, 1, step=0.05, label="Weight", scale=2))
                button = gradio.Button("Draw", variant="primary")
            with gradio.Column():
                with gradio.Row():
                    before = gradio.Image(label="Base", format="png", interactive=False)
                    after = gradio.Image(label="With the adapters", format="png", interactive=False)
                download = gradio.File(label="With the adapters, parameters inside")
        inputs = [prompt, negative, seed, steps, guidance, *names, *files, *weights]
        button.click(draw, inputs, [before, after, download], api_name="draw")
        prompt.submit(draw, inputs, [before, after, download], api_name=False)
    return page

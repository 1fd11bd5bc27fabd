"""Owns `densedino serve`: options, what is said at the start, and opening the page in a browser."""

from __future__ import annotations

import importlib.util
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from densedino.errors import require

if TYPE_CHECKING:
    from collections.abc import Callable

    from densedino.features.extractor import FeatureExtractor
    from densedino.serve.collection import Collection
    from densedino.serve.scene_map import SceneMap
    from densedino.serve.service import Service
    from densedino.serve.settings import Settings
    from densedino.weights.card import WeightsCard

__all__ = ["run"]


def run(
    inputs: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    *,
    port: int = 8188,
    host: str = "127.0.0.1",
    no_browser: bool = False,
    model: str | None = None,
    weights: str | None = None,
    device: str = "auto",
    engine: Literal["auto", "eager", "compile", "openvino", "onnx", "stream"] = "auto",
    precision: Literal["auto", "fp32", "bf16", "int8", "int4"] = "auto",
    token_file: Path | None = None,
    origin: tuple[str, ...] = (),
    max_bytes: int = 32 * 2**20,
    max_pixels: int = 50_000_000,
    max_tokens: int = 4096,
    max_requests: int = 32,
    max_wait: float = 5.0,
    max_batch: int = 8,
    decoders: int = 2,
    log: Literal["auto", "json", "text"] = "auto",
) -> int:
    """Open a page that shows dense features, and answer requests for them over HTTP.

    Try it with your own pictures: densedino serve photos/

    Look around in a store, and search it: densedino serve features/

    A service on another port, without a page being opened: densedino serve --port 9000 --no-browser

    Args:
        inputs: images, folders, patterns, lists; or one feature store. Or nothing: drop images into the page.
        port: to listen on; 0 takes any that is free.
        host: the address to listen on. Any but this machine's own needs a token.
        no_browser: do not open the page.
        model: an architecture or weights by name, see `densedino models` and `densedino weights`; of a store, its own.
        weights: a checkpoint: a file, an https:// URL, a hub id.
        device: auto, cpu, cuda, mps.
        engine: what runs the model: auto (the fastest that is installed), eager, compile, openvino, onnx, stream.
        precision: auto (bf16 on a GPU that has it), fp32, bf16, int8, int4.
        token_file: holds the token that requests must bring; else the variable DENSEDINO_TOKEN does, if it is set.
        origin: other origins whose pages may call, such as https://app.example.org.
        max_bytes: of one request.
        max_pixels: of one image.
        max_tokens: larger images are made smaller until they have at most so many patches.
        max_requests: images worked on or waiting; the next one is refused with 429.
        max_wait: seconds that an answer may take; an image that would be later is refused with 429.
        max_batch: images run at once.
        decoders: processes that decode images.
        log: json (a line per request), text (what goes wrong), auto: text on a terminal, else json.
    """
    for module in ("fastapi", "uvicorn", "python_multipart", "prometheus_client"):
        require(module, extra="serve", purpose="densedino serve")
    from densedino.serve.settings import Settings, read_token

    settings = Settings(
        host=host,
        port=port,
        token=read_token(token_file),
        origins=origin,
        max_bytes=max_bytes,
        max_pixels=max_pixels,
        max_tokens=max_tokens,
        max_requests=max_requests,
        max_wait=max_wait,
        max_batch=max_batch,
        decoders=decoders,
    )
    how = {"weights": weights, "device": device, "engine": engine, "precision": precision}
    _serve(inputs, settings, model, how, log=log, browser=not no_browser)
    print("densedino serve: stopped; what had been let in was answered.", file=sys.stderr)
    return 0


def _serve(
    inputs: tuple[str, ...], settings: Settings, model: str | None, how: dict[str, Any], *, log: str, browser: bool
) -> None:
    from densedino.features.extractor import load
    from densedino.serve.collection import open_collection
    from densedino.serve.running import listen, serve, write_log

    of_scene, card = _scene_of(inputs)
    collection = open_collection(() if of_scene else inputs)
    with listen(settings) as sock:
        card = collection.store.card if collection.store is not None else card
        if card is not None and model is None and how["weights"] is None:
            model = card.name
        dino = load(model, **how)
        collection.check_model(dino)
        scene = _open_scene(inputs[0], dino) if of_scene else None
        write_log(log if log != "auto" else "text" if sys.stderr.isatty() else "json")
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        address = f"http://{host}:{sock.getsockname()[1]}/"

        def started(service: Service, stop: Callable[[], None]) -> None:
            _say_start(service, settings, collection, address)
            if browser:
                _open_browser(address)

        serve(dino, sock, settings, collection=collection, scene=scene, started=started)


def _scene_of(inputs: tuple[str, ...]) -> tuple[bool, WeightsCard | None]:
    """Whether a raster or a scene's store is to be shown as a map, and the store's weights.

    That needs rasterio; without it a TIFF is one image.
    """
    if len(inputs) != 1 or importlib.util.find_spec("rasterio") is None:
        return False, None
    path = Path(inputs[0])
    if path.is_file():
        return path.suffix.lower() in (".tif", ".tiff", ".vrt"), None
    from densedino.serve.scene_map import scene_card

    card = scene_card(path)
    return card is not None, card


def _open_scene(given: str, dino: FeatureExtractor) -> SceneMap:
    from densedino.serve.scene_map import open_scene

    return open_scene(given, dino)


def _say_start(service: Service, settings: Settings, collection: Collection, address: str) -> None:
    dino = service.dino
    what = "UNTRAINED: random numbers" if dino.card.untrained else dino.card.licence
    print(f"weights    {dino.card.name} ({what})", file=sys.stderr)
    print(f"engine     {dino.engine.name}, {dino.precision}, on {dino.device}: {dino.engine_reason}", file=sys.stderr)
    sealed = "files and network refused by the kernel" if service.decoders.sealed else "limits on memory and time only"
    print(f"decoding   {settings.decoders} processes of their own, {sealed}", file=sys.stderr)
    if len(collection):
        print(f"images     {len(collection):,}, of {'a store' if collection.store else 'files'}", file=sys.stderr)
    if service.scene is not None:
        height, width = service.scene.scene.size
        print(f"scene      {height:,}×{width:,} pixels, {service.scene.levels} zoom levels", file=sys.stderr)
    access = "this machine only" if settings.token is None else "whoever has the token"
    print(f"access     {access}; Ctrl-C stops", file=sys.stderr)
    print(address, flush=True)


def _open_browser(address: str) -> None:
    import webbrowser

    # In a thread: some browsers run in the foreground of whoever starts them.
    threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()

"""Speed of the image download against a local server that answers 100 ms late, as a distant one would."""

from __future__ import annotations

import asyncio
import io
import json
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from .crawl import Settings, crawl

LATENCY = 0.1  # seconds


def _picture() -> bytes:
    held = io.BytesIO()
    Image.effect_noise((500, 500), 8).convert("RGB").save(held, "JPEG")  # about 40 kB, as product images have
    return held.getvalue()


@contextmanager
def late_server(body: bytes, latency: float = LATENCY) -> Iterator[str]:
    """Address of an HTTP/1.1 server in a thread that answers every request with `body` after `latency` seconds."""
    answer = b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(body) + body

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                await reader.readuntil(b"\r\n\r\n")
                await asyncio.sleep(latency)
                writer.write(answer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def start() -> asyncio.Server:
        return await asyncio.start_server(serve, "127.0.0.1", 0, backlog=512)

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    server = asyncio.run_coroutine_threadsafe(start(), loop).result()
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        loop.call_soon_threadsafe(server.close)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


def _seconds(address: str, images: int, concurrency: int) -> float:
    """Wall time of one whole crawl (asking, decoding, manifest) into an empty folder; all images must arrive."""
    with tempfile.TemporaryDirectory() as folder:
        items = {f"B0BENCH{i:04d}": {"title": "", "images": [{"large": f"{address}/{i}.jpg"}]} for i in range(images)}
        (Path(folder) / "item2meta_train.json").write_text(json.dumps(items), encoding="utf-8")
        start = time.perf_counter()
        counts = crawl(Path(folder), settings=Settings(concurrency=concurrency))
        seconds = time.perf_counter() - start
    if counts["ok"] != images:
        raise RuntimeError(f"only {counts['ok']} of {images} images arrived: nothing was measured")
    return seconds


def crawl_speed(one: int = 30, many: int = 600, concurrency: int = 32) -> dict[str, Any]:
    """Images a second with one request at a time and with `concurrency`, by the same code in one run, and their ratio."""
    body = _picture()
    with late_server(body) as address:
        slow, fast = one / _seconds(address, one, 1), many / _seconds(address, many, concurrency)
    return {"latency_ms": round(1000 * LATENCY), "bytes_per_image": len(body), "concurrency": concurrency,
            "one_at_a_time": {"images": one, "per_second": round(slow, 2)},
            "concurrent": {"images": many, "per_second": round(fast, 2)}, "ratio": round(fast / slow, 2)}

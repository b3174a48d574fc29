"""`serve --web`: the pages beside the API. With keys: tests/web/test_door.py."""

from pathlib import Path

import pytest

from xverse.checkpoint.load import open_checkpoint
from xverse.verbs import serve

pytest.importorskip("gradio", reason="the pages need Gradio")


def test_pages_are_mounted_beside_the_api(folder: Path) -> None:
    from fastapi import FastAPI
    from fastapi.testclient import TestClient

    app = FastAPI()
    mount = serve._pages(serve.Config(model=str(folder)).options())
    assert mount(app, "http://127.0.0.1:1", open_checkpoint(folder))(app) is app
    with TestClient(app) as client:
        assert client.get("/web/en/").is_success

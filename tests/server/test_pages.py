"""`serve --web`: the pages beside the API, and where they cannot be."""

from pathlib import Path

import pytest

from xverse.errors import XverseError
from xverse.verbs import serve

pytest.importorskip("gradio", reason="the pages need Gradio")


def test_pages_are_mounted_beside_the_api(folder: Path) -> None:
    from fastapi import FastAPI
    from fastapi.testclient import TestClient

    app = FastAPI()
    mount = serve._pages(serve.Config(model=str(folder)).options())
    mount(app, "http://127.0.0.1:1")
    with TestClient(app) as client:
        assert client.get("/web/en/").is_success


def test_pages_are_refused_where_a_key_is_asked_for(folder: Path) -> None:
    with pytest.raises(XverseError, match="key"):
        serve._pages(serve.Config(model=str(folder), api_key=("secret",)).options())

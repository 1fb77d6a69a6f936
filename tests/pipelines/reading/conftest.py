import pytest
from PIL import Image

from tests.pipelines.reading.photographs import photograph


@pytest.fixture(scope="module")
def cat() -> Image.Image:
    return photograph("chelsea")

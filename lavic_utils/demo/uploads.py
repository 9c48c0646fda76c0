"""Pictures that a visitor gives: limited in size and kind, decoded whole, written anew."""

from __future__ import annotations

import io

from PIL import Image, ImageOps

from lavic_utils.config import UserError
from lavic_utils.data import MIN_SIDE, as_rgb

# Photos of phones have up to 25 million pixels, and rarely more than 12 MB
MAX_BYTES, MAX_PIXELS, MAX_RATIO, KEPT_SIDE = 12 * 2**20, 25_000_000, 10, 1024
FORMATS = ("PNG", "JPEG", "WEBP")
TAKEN = (
    f"at least {MIN_SIDE} a side are taken, at most {MAX_PIXELS // 10**6} million in all, and no "
    f"side over {MAX_RATIO} times the other"
)


def read_upload(content: bytes) -> bytes:
    """A picture somebody gives as a small RGB PNG; what it calls itself is not looked at.

    UserError in one line where it is too large, of another format, damaged or hardly a picture.
    """
    if len(content) > MAX_BYTES:
        size = f"{len(content) / 2**20:.1f} MB"
        raise UserError(f"the picture has {size}; at most {MAX_BYTES // 2**20} MB are taken")
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)  # reads the header alone
        low, high = sorted(image.size)
        if low * high > MAX_PIXELS or low < MIN_SIDE or high > MAX_RATIO * low:
            raise UserError(f"the picture has {image.width} x {image.height} pixels; {TAKEN}")
        image = as_rgb(ImageOps.exif_transpose(image))
    except UserError:
        raise
    except Image.DecompressionBombError:
        raise UserError(f"the picture has too many pixels; {TAKEN}") from None
    except Exception as error:  # a decoder given anything may raise anything
        what = f"not a whole PNG, JPEG or WebP picture ({type(error).__name__})"
        raise UserError(f"{what}; give another file") from None
    image.thumbnail((KEPT_SIDE, KEPT_SIDE))
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()

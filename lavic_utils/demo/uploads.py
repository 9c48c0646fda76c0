"""Pictures that a visitor gives: limited in size and kind, decoded whole, written anew."""

from __future__ import annotations

import io

from PIL import Image, ImageOps

from lavic_utils.config import UserError

MAX_BYTES, MAX_PIXELS, MIN_SIDE, MAX_RATIO, KEPT_SIDE = 4 * 2**20, 16_000_000, 16, 10, 1024
FORMATS = ("PNG", "JPEG", "WEBP")


def read_upload(content: bytes) -> bytes:
    """A picture somebody gives, decoded whole and written anew as a small RGB PNG; what it calls itself is not looked at.
    UserError in one line for one too large, of another format, damaged or hardly a picture."""
    if len(content) > MAX_BYTES:
        raise UserError(
            f"the picture has {len(content) / 2**20:.1f} MB; at most {MAX_BYTES // 2**20} are taken"
        )
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)  # reads the header alone
        size, pixels = (
            f"the picture has {image.width} x {image.height} pixels",
            image.width * image.height,
        )
        if pixels > MAX_PIXELS:
            raise UserError(f"{size}; at most {MAX_PIXELS // 10**6} million are taken")
        if min(image.size) < MIN_SIDE or max(image.size) > MAX_RATIO * min(image.size):
            raise UserError(
                f"{size}; at least {MIN_SIDE} a side are needed, and no side over {MAX_RATIO} times the other"
            )
        image.verify()
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(content), formats=FORMATS)).convert(
            "RGB"
        )
        image.thumbnail((KEPT_SIDE, KEPT_SIDE))
    except Image.DecompressionBombError:
        raise UserError(
            f"the picture has too many pixels; at most {MAX_PIXELS // 10**6} million are taken"
        ) from None
    except UserError:
        raise
    except Exception as error:  # a decoder given anything may raise anything
        raise UserError(
            f"not a whole PNG, JPEG or WebP picture ({type(error).__name__}); give another file"
        ) from None
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()

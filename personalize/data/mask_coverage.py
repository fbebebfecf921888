"""Whether a mask can be right: one that marks next to nothing of a photo, or next to all of it, tells no subject apart.

The one rule for masks from alpha, from files and from a mask model.
"""

from collections.abc import Sequence

from personalize.common.errors import UserError
from personalize.data.crops import Photo

LEAST, MOST = 0.02, 0.95  # of the whole photo


def mask_fault(photo: Photo) -> str | None:
    """What is wrong with how much of a photo its mask covers, in words; None where nothing is, or there is no mask."""
    share = photo.covered
    if share is None or LEAST <= share <= MOST:
        return None
    return (
        f"the mask of {photo.name} marks {share:.1%} of the photo as the subject, where {LEAST:.0%} to {MOST:.0%} can be right"
    )


def require_usable_masks(photos: Sequence[Photo]) -> None:
    """UserError names the first photo whose mask has a fault; call it where masks decide what is trained on."""
    for photo in photos:
        if fault := mask_fault(photo):
            raise UserError(
                f"{fault}. White marks the subject: make the mask anew, take it out, or train without masks "
                f"(--set photos.background=1 --set photos.crop=center)."
            )

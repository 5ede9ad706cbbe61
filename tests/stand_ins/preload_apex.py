"""What ranks with the stand-in for apex's kernel have imported."""

from tests.stand_ins import stand_in_for_apex

stand_in_for_apex()


import tests.preload  # noqa: F401,E402

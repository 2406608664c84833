"""The command line says of an empty mask what it says of every mask, and no library adds words of its own."""

import logging

from mome.cli.quiet import quiet_readers


def test_highdicom_does_not_print_that_a_mask_is_empty():
    logging.getLogger("highdicom").setLevel(logging.WARNING)
    assert logging.getLogger("highdicom.seg.sop").isEnabledFor(logging.WARNING)
    quiet_readers()
    assert not logging.getLogger("highdicom.seg.sop").isEnabledFor(logging.WARNING)

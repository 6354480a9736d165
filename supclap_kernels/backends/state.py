"""The layout of what passes from stage to stage, by name: the same numbers as in csrc/params.h and
csrc/constants.h, from which the compiled module exports them (a test compares them).

    state    (STATE_ROWS, N)      m of each direction, l, l without the positive, then the geometry
    running  (2 DIRECTIONS, N)    m and l of the negatives so far (on a GPU PLANES rows, in pairs)
    sums     (ROW_SUMS, N)        sums over pairs for each row; tiles add to the first TILE_SUMS
"""

DIRECTIONS = 4
TEXT_ROWS, AUDIO_ROWS, SUPPORT_ROWS, OTHER_ROWS = range(DIRECTIONS)
"""The directions of the softmax: texts against audios, audios against texts, text support vectors
against audios, and (mirror) audio support vectors against texts or (shared) audios against text
support vectors."""

GEOMETRY_ROWS = 10
GAP, C, TILE_C, OFFSET, TEXT_INVERSE = range(5)
AUDIO_INVERSE, POSITIVE, STEP_TEXT, STEP_AUDIO, PANEL_POSITIVE = range(5, GEOMETRY_ROWS)
"""The geometry of the rows."""

STATE_L, STATE_OTHERS, STATE_GEOMETRY = DIRECTIONS, 2 * DIRECTIONS, 3 * DIRECTIONS
"""Where l, l without the positive, and the geometry begin in `state`."""
STATE_ROWS = STATE_GEOMETRY + GEOMETRY_ROWS

ROW_SUMS = 7
BASE, BIAS, RHO_TEXT, RHO_AUDIO, SUPPORT_TEXT, SUPPORT_AUDIO, RHO_LITERAL = range(ROW_SUMS)
TILE_SUMS = RHO_LITERAL

SIMILARITY = DIRECTIONS
"""The pair of planes after the directions': sum and count of the negatives' logits."""
PLANES = 2 * DIRECTIONS + 2

HIDDEN = -1e30
"""The logit of a hidden pair: finite, so that the difference of two is 0 and not NaN."""

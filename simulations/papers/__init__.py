"""The scoreboards of the papers: one file with the paper's data, and one line here."""

from papers import caesar, caesar_split, d2ft, droppeft, patrol, sfprompt
from papers.scoreboard import Scoreboard

PAPERS: dict[str, Scoreboard] = {
    "sfprompt": sfprompt.BOARD,
    "d2ft": d2ft.BOARD,
    "droppeft": droppeft.BOARD,
    "patrol": patrol.BOARD,
    "caesar": caesar.BOARD,
    "caesar-split": caesar_split.BOARD,
}

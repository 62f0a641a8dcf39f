"""The scoreboards of the papers: one file with the paper's data, and one line here."""

from papers import sfprompt
from papers.scoreboard import Scoreboard

PAPERS: dict[str, Scoreboard] = {"sfprompt": sfprompt.BOARD}

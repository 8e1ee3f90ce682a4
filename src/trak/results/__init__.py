"""What attribution gives back, how it is shown in a notebook, and how it is saved."""

from trak.results.attribution import Attribution, Groups
from trak.results.saved import check_save_folder

__all__ = ["Attribution", "Groups", "check_save_folder"]

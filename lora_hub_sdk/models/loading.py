"""One model is loaded at a time in this process."""

from __future__ import annotations

import threading
from typing import Final

#: Held while a model is built or read. transformers sets torch's default dtype, and patches torch, for all threads
#: while it does that: a model that another thread loads meanwhile gets that dtype, or parameters without data. Models
#: that are loaded can go on working.
LOADING: Final = threading.RLock()

"""trak's one logger: `logging.getLogger("trak")`; silent below warnings unless the application says otherwise."""

import logging

logger = logging.getLogger("trak")

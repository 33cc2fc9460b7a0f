"""`python -m trimtab`."""

from .cli import main

raise SystemExit(main())

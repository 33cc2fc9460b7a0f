"""`python -m trimtab`."""

import os

from .cli import main

if {"TRIMTAB_LAUNCHER", "TORCHELASTIC_RUN_ID"} & os.environ.keys():
    from .pipelines.launch import end_with_launcher  # not for everybody: it imports torch

    end_with_launcher()
raise SystemExit(main())

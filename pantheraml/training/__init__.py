"""The trainers: TRL and transformers own the loop, methods are overridden here."""

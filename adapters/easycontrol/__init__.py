"""EasyControl on Flux: the checkpoint, the condition's tokens, the pass that fills its cache, and the cached step."""

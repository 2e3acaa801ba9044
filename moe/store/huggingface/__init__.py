"""Exchanges weights with Hugging Face's directories: config.json, safetensors, tokenizer.json.

  decoders.py names.py   what the decoders' config.json and tensors mean here
  vit.py                 what a vision transformer's do
  families.py            which of these a directory, or a run, is
  published.py           config.json, whose values may be anything
  tensors.py             safetensors of a directory, a shard at a time
  matching.py            which tensor is read for which parameter
  importing.py           from a directory to a run
  exporting.py           from a run to a directory

No code of a directory is executed: config.json is JSON, safetensors are numbers.
"""

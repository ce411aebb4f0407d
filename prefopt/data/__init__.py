"""From a file to a batch: rows, chat, encode, collate, loader."""

"""What each runtime can load of an export, as rules."""

from a3cli.runtimes.rules import NO, UNTRIED, YES, Verdict, judge, summarise, tokenizer_class_of

__all__ = ["NO", "UNTRIED", "YES", "Verdict", "judge", "summarise", "tokenizer_class_of"]

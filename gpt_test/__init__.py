"""Tests. The folders mirror those of the packages. They need no network and no files outside the project."""

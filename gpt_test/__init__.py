"""Tests; the folders mirror those of the packages. They need no network and no files but their own."""

"""Tests by room: each folder tests the room of the same name; helpers holds what several of them use."""

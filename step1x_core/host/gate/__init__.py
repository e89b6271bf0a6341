"""Checking images and instructions."""

"""Campaigns that damage files and kill runs by the thousand."""

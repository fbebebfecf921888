"""Toyland's classes and what draws each: a pen and a subject in, its anchors out."""

from personalize.toyland.world import animals, objects

DRAW = {
    "dog": animals.draw_dog,
    "cat": animals.draw_cat,
    "rabbit": animals.draw_rabbit,
    "horse": animals.draw_horse,
    "duck": animals.draw_duck,
    "owl": animals.draw_owl,
    "teapot": objects.draw_teapot,
    "car": objects.draw_car,
    "boat": objects.draw_boat,
    "robot": objects.draw_robot,
    "backpack": objects.draw_backpack,
    "clock": objects.draw_clock,
}

from .build import prepare as prepare
